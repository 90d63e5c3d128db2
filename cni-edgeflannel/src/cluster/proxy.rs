//! Whether the API server is reached through an HTTP proxy, as many edge sites demand: pure.
//!
//! As for every Go program (kubectl, flanneld): the kubeconfig's `proxy-url`, else the environment's `HTTPS_PROXY` and `NO_PROXY`, or
//! their names in lower case; never for the node itself. Only proxies that are spoken to in plain HTTP; they are asked
//! for a tunnel (CONNECT), and TLS goes through it from end to end.

use http::{HeaderValue, Uri};
use hyper_util::client::proxy::matcher::{Intercept, Matcher};
use kube::config::Kubeconfig;
use std::net::IpAddr;

/// A proxy, and what it is told of who asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proxy {
    /// Where it is; without user and password.
    pub url: Uri,
    /// The header `Proxy-Authorization`.
    pub authorization: Option<HeaderValue>,
}

/// The proxy on the way to `server`; nothing when it is dialled directly.
///
/// # Errors
/// A sentence, when a proxy is named that cannot be used: going around it would not be what was meant.
pub fn choose(written: Option<&str>, environment: &Matcher, server: &Uri) -> Result<Option<Proxy>, String> {
    let found = match written.filter(|url| !url.is_empty()) {
        Some(url) => {
            let all = Matcher::builder().all(url).build().intercept(server);
            Some(all.ok_or_else(|| format!("the kubeconfig's proxy-url {:?} is no proxy's URL", bare(url)))?)
        }
        None if is_this_node(server) => None,
        None => environment.intercept(server),
    };
    found.map(usable).transpose()
}

/// `proxy-url` of the cluster that the kubeconfig's current context names.
#[must_use]
pub fn written(kubeconfig: &Kubeconfig) -> Option<String> {
    let current = kubeconfig.current_context.as_ref()?;
    let context = kubeconfig.contexts.iter().find(|context| context.name == *current)?.context.as_ref()?;
    let cluster = kubeconfig.clusters.iter().find(|cluster| cluster.name == context.cluster)?;
    cluster.cluster.as_ref()?.proxy_url.clone()
}

/// The environment's, as Go reads it: not `ALL_PROXY`, which curl knows.
///
/// # Errors
/// A sentence, when `HTTPS_PROXY` is no proxy's URL: going around it would not be what was meant.
pub fn environment(variable: impl Fn(&str) -> Option<String>) -> Result<Matcher, String> {
    let either = |name: &str| {
        let found = variable(name).filter(|text| !text.is_empty());
        found.or_else(|| variable(&name.to_lowercase())).unwrap_or_default()
    };
    let proxy = either("HTTPS_PROXY");
    let somewhere = Uri::from_static("https://example.com");
    if !proxy.is_empty() && Matcher::builder().https(&*proxy).build().intercept(&somewhere).is_none() {
        return Err(format!("HTTPS_PROXY {:?} is no proxy's URL", bare(&proxy)));
    }
    Ok(Matcher::builder().https(proxy).no(either("NO_PROXY")).build())
}

/// Without user and password.
fn bare(url: &str) -> String {
    match (url.split_once("://"), url.rsplit_once('@')) {
        (Some((scheme, _)), Some((_, place))) => format!("{scheme}://{place}"),
        (None, Some((_, place))) => place.to_owned(),
        (_, None) => url.to_owned(),
    }
}

fn usable(found: Intercept) -> Result<Proxy, String> {
    let url = found.uri().clone();
    if url.scheme_str() != Some("http") {
        return Err(format!("the proxy {url} cannot be used: only http:// is supported"));
    }
    Ok(Proxy { url, authorization: found.basic_auth().cloned() })
}

fn is_this_node(server: &Uri) -> bool {
    let host = server.host().unwrap_or_default().trim_matches(['[', ']']);
    host == "localhost" || host.parse().is_ok_and(|ip: IpAddr| ip.is_loopback())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn chosen(written: Option<&str>, proxy: &str, no_proxy: &str, server: &str) -> Result<String, String> {
        let environment = Matcher::builder().https(proxy).no(no_proxy).build();
        let proxy = choose(written, &environment, &server.parse().unwrap())?;
        Ok(proxy.map_or_else(|| "direct".into(), |proxy| proxy.url.to_string()))
    }

    #[test]
    fn which_way() {
        let site = "http://proxy.site:3128";
        for (written, proxy, no_proxy, server, way) in [
            (None, "", "", "https://api.example.com:6443", "direct"),
            (None, site, "", "https://api.example.com:6443", "http://proxy.site:3128/"),
            (None, "proxy.site:3128", "", "https://10.10.0.2:6443", "http://proxy.site:3128/"),
            (None, site, "example.com", "https://api.example.com:6443", "direct"),
            (None, site, "10.0.0.0/8,fd00::/8", "https://10.10.0.2:6443", "direct"),
            (None, site, "10.0.0.0/8,fd00::/8", "https://[fd00::2]:6443", "direct"),
            (None, site, "10.0.0.0/8", "https://[fd00::2]:6443", "http://proxy.site:3128/"),
            (None, site, "", "https://127.0.0.1:6443", "direct"),
            (None, site, "", "https://[::1]:6443", "direct"),
            (None, site, "", "https://localhost:6443", "direct"),
            (Some("http://own:1"), site, "*", "https://api.example.com:6443", "http://own:1/"),
            (Some(""), site, "", "https://api.example.com:6443", "http://proxy.site:3128/"),
        ] {
            let found = chosen(written, proxy, no_proxy, server);
            assert_eq!(found.as_deref(), Ok(way), "{written:?} {proxy:?} {no_proxy:?} {server}");
        }
    }

    #[test]
    fn what_cannot_be_used_is_said() {
        let server = "https://api.example.com:6443";
        for proxy in ["https://proxy.site:3128", "socks5://proxy.site:1080"] {
            let said = chosen(None, proxy, "", server).unwrap_err();
            assert!(said.contains(proxy) && said.contains("only http://"), "{said}");
        }
        let said = chosen(Some("ftp://u:secret@x"), "", "", server).unwrap_err();
        assert!(said.contains("\"ftp://x\""), "{said}");
    }

    #[test]
    fn the_environment_is_read_as_go_reads_it() {
        let read = |set: &[(&str, &str)]| {
            let value =
                |name: &str| set.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
            let matcher = environment(value)?;
            let found = choose(None, &matcher, &"https://api.example.com:6443".parse().unwrap())?;
            Ok::<_, String>(found.map(|proxy| proxy.url.to_string()))
        };
        assert_eq!(read(&[]), Ok(None));
        assert_eq!(read(&[("ALL_PROXY", "socks5://x:1")]), Ok(None));
        assert_eq!(read(&[("https_proxy", "http://x:1")]).unwrap().as_deref(), Some("http://x:1/"));
        assert_eq!(read(&[("HTTPS_PROXY", "http://x:1"), ("no_proxy", "example.com")]), Ok(None));
        let said = read(&[("HTTPS_PROXY", "ftp://u:secret@x")]).unwrap_err();
        assert_eq!(said, "HTTPS_PROXY \"ftp://x\" is no proxy's URL");
    }

    #[test]
    fn user_and_password_are_a_header_and_not_shown() {
        let environment = Matcher::builder().https("http://user:secret@proxy.site:3128").build();
        let proxy = choose(None, &environment, &"https://api:6443".parse().unwrap()).unwrap().unwrap();
        assert_eq!(proxy.authorization.as_ref().unwrap(), "Basic dXNlcjpzZWNyZXQ=");
        assert!(
            !format!("{proxy:?}").contains("secret") && !format!("{proxy:?}").contains("dXNl"),
            "{proxy:?}"
        );
    }

    #[test]
    fn of_the_current_context() {
        let text = r#"{"current-context": "b", "contexts": [
            {"name": "a", "context": {"cluster": "one", "user": "u"}}, {"name": "b", "context": {"cluster": "two", "user": "u"}}],
            "clusters": [{"name": "one", "cluster": {"server": "https://x", "proxy-url": "http://wrong"}},
                {"name": "two", "cluster": {"server": "https://x", "proxy-url": "http://right"}}], "users": []}"#;
        let kubeconfig: Kubeconfig = serde_json::from_str(text).unwrap();
        assert_eq!(written(&kubeconfig).as_deref(), Some("http://right"));
        assert_eq!(written(&Kubeconfig::default()), None);
    }
}
