//! What a person typed, turned into what is to be done. Pure.

use anyhow::{Context, Result, bail, ensure};
use integration::node::Cni;
use integration::topology::Options;

/// One run of `rig`.
#[derive(Debug)]
pub enum Request {
    Build,
    Demo,
    Up(Options),
    Down,
    DownAll,
    Cut(String),
    Heal(Option<String>),
    Reboot { node: String, power_cut: bool },
    Kubectl(Vec<String>),
    Enter { host: String, command: Vec<String> },
    Status,
    Logs(Option<String>),
}

/// The rig's name and what to do to it; nothing when help was asked for.
pub fn parse(words: &[String]) -> Result<Option<(String, Request)>> {
    let mut words = words.to_vec();
    let Some(verb) = (!words.is_empty()).then(|| words.remove(0)) else { return Ok(None) };
    let passes_on = matches!(verb.as_str(), "kubectl" | "enter");
    let name = take_name(&mut words, passes_on)?.unwrap_or_else(|| "default".to_owned());
    let request = match verb.as_str() {
        "help" | "-h" | "--help" => return Ok(None),
        "build" => none_left(&words).map(|()| Request::Build)?,
        "demo" => none_left(&words).map(|()| Request::Demo)?,
        "up" => Request::Up(options(&words)?),
        "down" => match flag(&mut words, "--all") {
            true => none_left(&words).map(|()| Request::DownAll)?,
            false => none_left(&words).map(|()| Request::Down)?,
        },
        "cut" => Request::Cut(at_most_one(words)?.context("cut what? a node, a site, or cloud")?),
        "heal" => Request::Heal(at_most_one(words)?),
        "reboot" => {
            let power_cut = flag(&mut words, "--power-cut");
            Request::Reboot { node: at_most_one(words)?.context("reboot which node?")?, power_cut }
        }
        "kubectl" => Request::Kubectl(words),
        "enter" => {
            ensure!(!words.is_empty(), "enter which host?");
            Request::Enter { host: words.remove(0), command: words }
        }
        "status" => none_left(&words).map(|()| Request::Status)?,
        "logs" => Request::Logs(at_most_one(words)?),
        _ => bail!("no command is called {verb}; `rig help` lists them"),
    };
    Ok(Some((name, request)))
}

/// Takes `--name RIG` out; of words that are passed on, only from the front.
fn take_name(words: &mut Vec<String>, only_first: bool) -> Result<Option<String>> {
    let Some(at) = words.iter().position(|word| word == "--name") else { return Ok(None) };
    if only_first && at > 0 {
        return Ok(None);
    }
    ensure!(at + 1 < words.len(), "--name needs a rig's name");
    words.remove(at);
    Ok(Some(words.remove(at)))
}

fn flag(words: &mut Vec<String>, flag: &str) -> bool {
    let before = words.len();
    words.retain(|word| word != flag);
    words.len() < before
}

fn none_left(words: &[String]) -> Result<()> {
    ensure!(words.is_empty(), "{} is not understood; `rig help` says what is", words.join(" "));
    Ok(())
}

fn at_most_one(mut words: Vec<String>) -> Result<Option<String>> {
    let first = (!words.is_empty()).then(|| words.remove(0));
    none_left(&words)?;
    Ok(first)
}

fn options(words: &[String]) -> Result<Options> {
    let mut options = Options::default();
    let mut words = words.iter();
    while let Some(word) = words.next() {
        let mut value =
            || words.next().with_context(|| format!("{word} needs a value; `rig help` says which"));
        match word.as_str() {
            "--nodes" => options.nodes = value()?.parse().context("--nodes needs a number")?,
            "--site" => {
                let (site, nodes) = value()?.split_once(':').context("write --site NAME:node1,node2")?;
                options.sites.push((site.to_owned(), list(nodes)));
            }
            "--nat" => options.nat.extend(list(value()?)),
            "--same-address" => options.same_address = true,
            "--cni" => options.cni = value()?.parse::<Cni>()?,
            "--wan" => options.wan = value()?.parse()?,
            "--disk-images" => options.disk_images = true,
            "--konnectivity" => options.konnectivity = true,
            "--tunnel" => options.tunnel = Some(value()?.parse()?),
            "--kube-proxy" => options.kube_proxy = true,
            _ => bail!("up: {word} is not understood; `rig help` says what is"),
        }
    }
    Ok(options)
}

fn list(text: &str) -> Vec<String> {
    text.split(',').filter(|item| !item.is_empty()).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<String> {
        line.split_whitespace().map(str::to_owned).collect()
    }

    fn parsed(line: &str) -> (String, Request) {
        parse(&words(line)).unwrap().unwrap()
    }

    #[test]
    fn a_full_line() {
        let line = "up --name x --nodes 3 --site A:node1,node2 --nat node3 --same-address --cni bridge --wan delay=5ms";
        let (name, Request::Up(options)) = parsed(line) else { panic!("not an up") };
        assert_eq!(
            (name.as_str(), options.nodes, options.same_address, options.cni),
            ("x", 3, true, Cni::Bridge)
        );
        assert_eq!(options.sites, [("A".to_owned(), words("node1 node2"))]);
        assert_eq!(options.nat, ["node3"]);
        assert!(!options.wan.is_plain());
    }

    #[test]
    fn what_is_passed_on_is_passed_on_whole() {
        let (name, Request::Kubectl(arguments)) = parsed("kubectl --name x get pods --name y") else {
            panic!()
        };
        assert_eq!((name.as_str(), arguments), ("x", words("get pods --name y")));
        let (name, Request::Enter { host, command }) = parsed("enter node1 ip -o addr") else { panic!() };
        assert_eq!((name.as_str(), host.as_str(), command), ("default", "node1", words("ip -o addr")));
    }

    #[test]
    fn mistakes_are_named() {
        for (line, word) in [
            ("fly", "fly"),
            ("up --node 3", "--node"),
            ("up --nodes", "--nodes needs"),
            ("up --cni calico", "calico"),
            ("up --tunnel grpc", "uds or tcp"),
            ("cut", "cut what"),
            ("heal a b", "b is not understood"),
            ("down everything", "everything"),
            ("status --name", "--name needs"),
        ] {
            let error = format!("{:#}", parse(&words(line)).unwrap_err());
            assert!(error.contains(word), "{line}: {error}");
        }
        assert!(parse(&[]).unwrap().is_none() && parse(&words("--help")).unwrap().is_none());
    }
}
