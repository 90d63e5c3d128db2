//! What is done to bytes from outside, one function per target.
//!
//! libFuzzer calls them with inputs of its own making (`scripts/fuzz.sh`), `tests/corpus.rs` with the inputs that were
//! kept because they once reached something new. A target fails by panicking.

use cni::{Environment, Error, NetConf, Request, Success, Version};
use tunnel::{
    config::outbound,
    connect::{HEAD_LIMIT, Progress, Reader},
    head,
    hello::{Answer, BODY_LIMIT, HEADER, Hello, body_length},
    peers::news::{self, Line, NotNews},
    proxy::{
        request::{self, METHODS, What},
        response,
    },
    server_name::{self, Meant},
    target::Target,
};

/// A whole call: `NAME=VALUE` lines, an empty line, then stdin.
pub fn request(data: &[u8]) {
    let (head, stdin) = match data.windows(2).position(|pair| pair == b"\n\n") {
        Some(at) => (&data[..at], &data[at + 2..]),
        None => (&b""[..], data),
    };
    let head = String::from_utf8_lossy(head);
    let environment: Environment = head.lines().filter_map(|line| line.split_once('=')).collect();
    let mut version = Version::LATEST;
    if let Err(error) = Request::read(&environment, &mut &*stdin, &mut version) {
        told(&error, version);
    }
}

/// A result, as a delegate prints it: what can be read is written and read again in every version.
pub fn result(data: &[u8]) {
    let Ok(document) = serde_json::from_slice(data) else {
        return;
    };
    for version in Version::ALL {
        match Success::parse(&document, version) {
            Ok(result) => {
                let written = result.render(Version::LATEST);
                assert_eq!(Success::parse(&written, Version::V0_1_0).as_ref(), Ok(&result), "{written}");
                let older = result.render(version);
                let read = Success::parse(&older, version);
                assert_eq!(read.map(|read| read.render(version)), Ok(older));
            }
            Err(error) => told(&error, version),
        }
    }
}

/// A network configuration, as `ipam-sticky` and as `edgeflannel` understand it.
pub fn config(data: &[u8]) {
    let mut version = Version::LATEST;
    let conf = match NetConf::parse(data.to_vec(), &mut version) {
        Ok(conf) => conf,
        Err(error) => return told(&error, version),
    };
    let ipam = ipam_sticky::config::Written::read(&conf)
        .and_then(|written| written.config(conf.name.as_str(), conf.version));
    let plugin = cni_edgeflannel::config::Config::new(&conf, None);
    for error in [ipam.err(), plugin.as_ref().err().cloned()].into_iter().flatten() {
        told(&error, version);
    }
    // What is handed to the IPAM plugin is a configuration that it can read.
    if let Ok(plugin) = plugin {
        let handed = cni_edgeflannel::ipam::stdin(&conf, &plugin, None).into_owned();
        assert!(NetConf::parse(handed, &mut version).is_ok());
    }
}

/// flannel's subnet.env.
pub fn subnet_env(data: &[u8]) {
    if let Ok(node) = cni_edgeflannel::subnet_env::parse(&String::from_utf8_lossy(data)) {
        assert!(!node.subnets.is_empty() && !node.networks.is_empty() && node.mtu > 0);
    }
}

/// A refusal is a sentence and a document.
fn told(error: &Error, version: Version) {
    assert!(error.code > 0 && !error.msg.is_empty(), "{error:?}");
    assert_eq!(error.render(version)["cniVersion"], version.as_str());
}

/// The head of a CONNECT. However it is cut, the outcome is the same; a refusal is one well-formed answer.
pub fn connect(data: &[u8]) {
    let whole = Reader::new().push(data);
    for size in [1, 7, 4096] {
        let mut reader = Reader::new();
        let mut pushed = 0;
        let mut pieces = Progress::More;
        for piece in data.chunks(size) {
            pushed += piece.len();
            pieces = reader.push(piece);
            if pieces != Progress::More {
                break;
            }
        }
        match (&whole, &mut pieces) {
            (Progress::Done(whole), Progress::Done(request)) => {
                request.early = [&request.early[..], &data[pushed..]].concat().into();
                assert_eq!(whole, request);
            }
            (whole, pieces) => assert_eq!(whole, pieces),
        }
    }
    match whole {
        Progress::More => assert!(data.len() <= HEAD_LIMIT),
        Progress::Done(request) => {
            assert_eq!(Target::parse(request.target.to_string().as_bytes()), Ok(request.target));
            assert!(data.ends_with(&request.early));
        }
        Progress::Refused(refusal) => {
            let answer = refusal.response();
            let head = String::from_utf8_lossy(&answer);
            let (head, body) = head.split_once("\r\n\r\n").unwrap_or_default();
            assert!(head.lines().count() <= 5 && head.is_ascii() && !body.is_empty(), "{head}");
        }
    }
}

/// A hello and the answer to it, as a reader of the socket takes them apart.
pub fn hello(data: &[u8]) {
    let Some((header, rest)) = data.split_first_chunk::<HEADER>() else { return };
    let Ok(length) = body_length(*header) else { return };
    assert!(length <= BODY_LIMIT);
    let Some(body) = rest.get(..length) else { return };
    if let Ok(hello) = Hello::decode(body) {
        assert_eq!(Hello::decode(&hello.encode()[HEADER..]), Ok(hello));
    }
    if let Ok(answer) = Answer::decode(body) {
        assert_eq!(Answer::decode(&answer.encode()[HEADER..]), Ok(answer));
    }
}

/// What a proxy on the agent's way out answers.
pub fn proxy_answer(data: &[u8]) {
    match outbound::answered(data) {
        Ok(Some(length)) => assert!(length <= data.len()),
        Ok(None) => assert!(data.len() < outbound::ANSWER_LIMIT),
        Err(why) => assert!(why.bytes().all(|byte| (b' '..=b'~').contains(&byte)), "{why}"),
    }
}

/// The first bytes of a connection to a node that nobody opens: a ClientHello, or plain HTTP. However they are cut, the
/// same node is meant, and it gets every byte.
pub fn client_hello(data: &[u8]) {
    let read = |size| {
        let mut reader = server_name::Reader::new();
        let mut pushed = 0;
        for piece in data.chunks(size) {
            pushed += piece.len();
            if let Some(Meant { name, bytes }) = reader.push(piece)? {
                assert_eq!(bytes, data[..pushed]);
                return Ok(Some(name));
            }
        }
        Ok(None)
    };
    let whole = read(4096).map_err(|refusal: tunnel::refusal::Refusal| refusal.reason);
    for size in [1, 7] {
        assert_eq!(read(size).map_err(|refusal| refusal.reason), whole);
    }
    if let Ok(Some(name)) = whole {
        assert_eq!(name.as_str().parse(), Ok(name));
    }
}

/// What a scraper asks the proxy for, and what the target is told; then the same bytes as an answer of the target.
pub fn proxy_request(data: &[u8]) {
    let mut reader = head::Reader::new(METHODS);
    if let Ok(Some(head)) = reader.push(data)
        && let Ok(asked) = request::read(&head)
        && let What::Page(page) = asked.what
    {
        // One head, in origin form, without a word about the connection to us.
        let mut headers = [httparse::EMPTY_HEADER; 2 * head::HEADERS_LIMIT];
        let mut request = httparse::Request::new(&mut headers);
        assert_eq!(request.parse(&page), Ok(httparse::Status::Complete(page.len())));
        assert!(request.path.is_some_and(|path| path.starts_with('/')));
        let count =
            |name: &str| request.headers.iter().filter(|it| it.name.eq_ignore_ascii_case(name)).count();
        assert_eq!([count("proxy-authorization"), count("host"), count("connection")], [0, 1, 1]);
    }
    if let response::Seen::Head(length, written) = response::read(data) {
        assert!(length <= data.len());
        assert!(matches!(response::read(&written), response::Seen::Head(again, _) if again == written.len()));
    }
}

/// What one replica tells another. However it is cut, the lines are the same, and written again they are read again.
pub fn news(data: &[u8]) {
    let read = |size: usize| -> Result<Vec<Line>, NotNews> {
        let mut reader = news::Reader::default();
        let (mut lines, mut table) = (Vec::new(), news::Table::default());
        for piece in data.chunks(size) {
            reader.push(piece);
            while let Some(line) = reader.line()? {
                table.take(line.clone())?;
                lines.push(line);
            }
        }
        Ok(lines)
    };
    let whole = read(data.len().max(1));
    assert_eq!(read(1), whole);
    for line in whole.into_iter().flatten() {
        let mut text = String::new();
        line.write(&mut text);
        assert_eq!(Line::read(text.trim_end_matches('\n').as_bytes()), Ok(Some(line)));
    }
}
