//! The HTTP proxy for scrapers, its pure parts: what a request asks for ([`request`]), what is passed on of an answer
//! ([`response`]), and who may ask ([`users`]). The listener is `frontend::proxy`.

pub mod request;
pub mod response;
pub mod users;

/// Whether a header speaks of one connection and not of what travels on it (RFC 9110, 7.6.1), so that a proxy keeps it
/// to itself. `named` are the values of the message's `Connection` headers.
fn is_hop_by_hop(name: &str, named: &[&[u8]]) -> bool {
    const ALWAYS: [&str; 8] = [
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authentication-info",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "upgrade",
    ];
    let tokens = || named.iter().flat_map(|value| value.split(|&byte| byte == b','));
    ALWAYS.iter().any(|always| always.eq_ignore_ascii_case(name))
        || tokens().any(|token| token.trim_ascii().eq_ignore_ascii_case(name.as_bytes()))
}

/// The values of a message's `Connection` headers.
fn connection<'a>(headers: &[httparse::Header<'a>]) -> Vec<&'a [u8]> {
    let named = headers.iter().filter(|header| header.name.eq_ignore_ascii_case("connection"));
    named.map(|header| header.value).collect()
}

/// Writes a header line.
fn write(out: &mut Vec<u8>, header: &httparse::Header<'_>) {
    out.extend_from_slice(header.name.as_bytes());
    out.extend_from_slice(b": ");
    out.extend_from_slice(header.value);
    out.extend_from_slice(b"\r\n");
}
