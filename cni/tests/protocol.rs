//! The protocol seen from the runtime's side: environment and stdin in, stdout and exit code out.
//!
//! The plugin under test records what reached it, so each case also says that a bad call reached nothing.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use cni::{Attachment, AttachmentId, Call, Environment, Error, Ip, Plugin, Reply, Success, serve};
use serde_json::{Value, json};
use std::{cell::RefCell, path::Path};

/// Answers as told and remembers what it was asked.
#[derive(Default)]
struct Recorder {
    asked: RefCell<Vec<String>>,
    fails: Option<Error>,
    panics: bool,
}

impl Recorder {
    fn note(&self, what: String) -> Result<(), Error> {
        self.asked.borrow_mut().push(what);
        assert!(!self.panics, "told to panic");
        self.fails.clone().map_or(Ok(()), Err)
    }
}

impl Plugin for Recorder {
    fn about(&self) -> String {
        "recorder".into()
    }
    fn add(&self, call: &Call, at: &Attachment, netns: &Path) -> Result<Success, Error> {
        let prev = call.conf.prev_result.as_ref().map_or(0, |prev| prev.ips.len());
        self.note(format!("ADD {} {} {} {prev}", at.id.container_id, at.id.ifname, netns.display()))?;
        let ip = Ip { address: "10.1.0.5/16".parse().unwrap(), gateway: None, interface: None };
        Ok(Success { ips: vec![ip], ..Success::default() })
    }
    fn del(&self, call: &Call, at: &Attachment, netns: Option<&Path>) -> Result<(), Error> {
        self.note(format!("DEL {} {netns:?} {}", at.id.container_id, call.conf.prev_result.is_some()))
    }
    fn check(&self, _: &Call, at: &Attachment, _: &Path) -> Result<(), Error> {
        self.note(format!("CHECK {}", at.id.container_id))
    }
    fn gc(&self, _: &Call, valid: Option<&[AttachmentId]>) -> Result<(), Error> {
        let ids = valid.map(|valid| {
            valid.iter().map(|id| format!("{}/{}", id.container_id, id.ifname)).collect::<Vec<_>>()
        });
        self.note(format!("GC {ids:?}"))
    }
    fn status(&self, call: &Call) -> Result<(), Error> {
        self.note(format!("STATUS {}", call.conf.name))
    }
}

const ENVIRONMENT: [(&str, &str); 5] = [
    ("CNI_CONTAINERID", "c1"),
    ("CNI_NETNS", "/run/netns/none"),
    ("CNI_IFNAME", "eth0"),
    ("CNI_PATH", "/opt/cni/bin"),
    ("CNI_ARGS", ""),
];

fn environment(command: &str, change: &[(&str, &str)]) -> Environment {
    let changed = change.iter().copied();
    ENVIRONMENT.into_iter().chain([("CNI_COMMAND", command)]).chain(changed).collect()
}

fn call(plugin: &Recorder, command: &str, change: &[(&str, &str)], stdin: &[u8]) -> Reply {
    serve(plugin, &environment(command, change), &mut &*stdin)
}

fn conf(version: &str) -> Vec<u8> {
    json!({"cniVersion": version, "name": "net", "type": "recorder"}).to_string().into_bytes()
}

fn document(reply: &Reply) -> Value {
    assert_eq!(reply.stdout.matches('\n').count(), 1, "one document, one line: {:?}", reply.stdout);
    serde_json::from_str(&reply.stdout).unwrap()
}

/// The error code of a refused call, having checked the document around it.
fn refused(reply: &Reply, version: &str) -> u64 {
    assert!(!reply.success, "{reply:?}");
    let document = document(reply);
    assert_eq!(document["cniVersion"], version, "{document}");
    assert!(document["msg"].as_str().is_some_and(|msg| msg.len() > 10), "{document}");
    document["code"].as_u64().unwrap()
}

#[test]
fn add_prints_the_result_in_the_callers_version() {
    for (version, key) in
        [("0.1.0", "ip4"), ("0.2.0", "ip4"), ("0.3.1", "ips"), ("0.4.0", "ips"), ("1.1.0", "ips")]
    {
        let plugin = Recorder::default();
        let reply = call(&plugin, "ADD", &[], &conf(version));
        assert!(reply.success);
        assert_eq!(document(&reply)["cniVersion"], version);
        assert!(document(&reply).get(key).is_some(), "{}", reply.stdout);
        assert_eq!(*plugin.asked.borrow(), ["ADD c1 eth0 /run/netns/none 0"]);
    }
    // No version at all is 0.1.0, whether missing, null or empty.
    for conf in
        [r#"{"name":"net"}"#, r#"{"name":"net","cniVersion":null}"#, r#"{"name":"net","CNIVersion":""}"#]
    {
        let reply = call(&Recorder::default(), "ADD", &[], conf.as_bytes());
        assert_eq!(document(&reply)["cniVersion"], "0.1.0");
    }
}

#[test]
fn the_other_verbs_print_nothing() {
    let prev = json!({"cniVersion": "1.1.0", "name": "net", "prevResult": {"ips": []}}).to_string();
    for command in ["DEL", "CHECK", "GC", "STATUS"] {
        let plugin = Recorder::default();
        let reply = call(&plugin, command, &[], prev.as_bytes());
        assert!(reply.success, "{reply:?}");
        assert_eq!((reply.stdout.as_str(), reply.stderr.as_str()), ("", ""), "{command}");
        assert_eq!(plugin.asked.borrow().len(), 1);
    }
}

#[test]
fn version_echoes_what_was_asked_and_survives_anything() {
    for (stdin, version) in [
        (r#"{"cniVersion":"0.4.0"}"#, "0.4.0"),
        (r#"{"cniVersion":"9.0.0"}"#, "1.1.0"),
        (r#"{"cniVersion":7}"#, "1.1.0"),
        ("{}", "1.1.0"),
        ("", "1.1.0"),
        ("garbage", "1.1.0"),
    ] {
        let only_command = Environment::from_iter([("CNI_COMMAND", "VERSION")]);
        let reply = serve(&Recorder::default(), &only_command, &mut stdin.as_bytes());
        assert!(reply.success);
        let document = document(&reply);
        assert_eq!(document["cniVersion"], version, "{stdin}");
        assert_eq!(document["supportedVersions"].as_array().unwrap().len(), 7);
    }
}

#[test]
fn a_person_is_told_what_this_is() {
    let reply = serve(&Recorder::default(), &Environment::default(), &mut &b""[..]);
    assert!(reply.success);
    assert_eq!(reply.stdout, "");
    assert!(reply.stderr.starts_with("recorder\nCNI protocol versions supported: 0.1.0, "));
}

#[test]
fn bad_calls_get_the_specs_code_and_reach_nothing() {
    let good = conf("1.1.0");
    let text = |text: &str| text.as_bytes().to_vec();
    let no_command_floor = conf("0.3.1");
    let deep = vec![b'['; 100_000];
    type Case<'a> = (&'a str, &'a [(&'a str, &'a str)], Vec<u8>, u64);
    let cases: Vec<Case> = vec![
        ("FROB", &[], good.clone(), 4),
        ("add", &[], good.clone(), 4),
        ("ADD", &[("CNI_CONTAINERID", "")], good.clone(), 4),
        ("ADD", &[("CNI_NETNS", "")], good.clone(), 4),
        ("ADD", &[("CNI_IFNAME", "")], good.clone(), 4),
        ("ADD", &[("CNI_PATH", "")], good.clone(), 4),
        ("CHECK", &[("CNI_NETNS", "")], good.clone(), 4),
        ("DEL", &[("CNI_CONTAINERID", "")], good.clone(), 4),
        ("GC", &[("CNI_PATH", "")], good.clone(), 4),
        ("STATUS", &[("CNI_PATH", "")], good.clone(), 4),
        ("ADD", &[("CNI_CONTAINERID", "../../etc")], good.clone(), 4),
        ("ADD", &[("CNI_IFNAME", "a/b")], good.clone(), 4),
        ("ADD", &[("CNI_IFNAME", "sixteen-letters-")], good.clone(), 4),
        ("ADD", &[("CNI_ARGS", "A=1;B")], good.clone(), 4),
        ("ADD", &[], vec![], 6),
        ("ADD", &[], text("garbage"), 6),
        ("ADD", &[], text("{\"name\":\"net\""), 6),
        ("ADD", &[], text("[]"), 6),
        ("ADD", &[], text("null"), 6),
        ("ADD", &[], vec![0xff, 0xfe, 0x00], 6),
        ("ADD", &[], deep, 6),
        ("ADD", &[], text(r#"{"name":7}"#), 6),
        ("ADD", &[], text(r#"{"cniVersion":1,"name":"net"}"#), 6),
        ("ADD", &[], text(r#"{"cniVersion":"1.1.0"}"#), 7),
        ("ADD", &[], text(r#"{"cniVersion":"1.1.0","name":""}"#), 7),
        ("ADD", &[], text(r#"{"cniVersion":"1.1.0","name":"a/b"}"#), 7),
        ("ADD", &[], text(r#"{"cniVersion":"1.2.0","name":"net"}"#), 1),
        ("ADD", &[], text(r#"{"cniVersion":"1.1.0","name":"net","prevResult":{"ips":7}}"#), 6),
        ("CHECK", &[], good.clone(), 7),
        ("CHECK", &[], no_command_floor.clone(), 1),
        ("GC", &[], conf("1.0.0"), 1),
        ("STATUS", &[], no_command_floor, 1),
        ("GC", &[], text(r#"{"cniVersion":"1.1.0","name":"n","cni.dev/valid-attachments":7}"#), 6),
        (
            "GC",
            &[],
            text(
                r#"{"cniVersion":"1.1.0","name":"n","cni.dev/valid-attachments":[{"containerID":"/","ifname":"e"}]}"#,
            ),
            7,
        ),
    ];
    for (command, change, stdin, code) in cases {
        let plugin = Recorder::default();
        let reply = call(&plugin, command, change, &stdin);
        let shown = String::from_utf8_lossy(&stdin[..stdin.len().min(80)]).into_owned();
        // The version is the configuration's when that could be read.
        let version = document(&reply)["cniVersion"].as_str().unwrap().to_owned();
        assert_eq!(refused(&reply, &version), code, "{command} {change:?} {shown}");
        assert!(plugin.asked.borrow().is_empty(), "{command} {change:?} {shown}");
    }
}

#[test]
fn every_missing_variable_is_named_at_once() {
    let reply = serve(
        &Recorder::default(),
        &Environment::from_iter([("CNI_COMMAND", "ADD")]),
        &mut conf("1.1.0").as_slice(),
    );
    let msg = document(&reply)["msg"].as_str().unwrap().to_owned();
    assert_eq!(msg, "required env variables [CNI_CONTAINERID,CNI_NETNS,CNI_IFNAME,CNI_PATH] missing");
}

#[test]
fn errors_are_told_in_the_callers_version_and_with_the_plugins_code() {
    for code in [11, 100, 999] {
        let fails = Error { code, msg: "the pool is exhausted".into(), details: "of 254".into() };
        for command in ["ADD", "DEL"] {
            let plugin = Recorder { fails: Some(fails.clone()), ..Recorder::default() };
            let reply = call(&plugin, command, &[], &conf("0.4.0"));
            assert_eq!(refused(&reply, "0.4.0"), u64::from(code));
            assert_eq!(document(&reply)["details"], "of 254");
        }
    }
    let reply = call(&Recorder::default(), "ADD", &[], br#"{"cniVersion":"0.3.1","name":""}"#);
    assert_eq!(refused(&reply, "0.3.1"), 7);
}

#[test]
fn a_panic_is_an_error_document_too() {
    let plugin = Recorder { panics: true, ..Recorder::default() };
    let reply = call(&plugin, "ADD", &[], &conf("1.0.0"));
    assert_eq!(refused(&reply, "1.0.0"), 999);
    assert!(document(&reply)["msg"].as_str().unwrap().contains("told to panic"));
}

#[test]
fn del_needs_neither_netns_nor_a_readable_previous_result() {
    // containerd#8197, k3s#6185: a zero-length result cache left pods Terminating for ever.
    let torn = br#"{"cniVersion":"1.0.0","name":"net","prevResult":{"ips":"torn"}}"#;
    let plugin = Recorder::default();
    let reply = call(&plugin, "DEL", &[("CNI_NETNS", "")], torn);
    assert!(reply.success, "{reply:?}");
    assert_eq!(*plugin.asked.borrow(), ["DEL c1 None false"]);
}

#[test]
fn the_plugins_own_netns_is_refused_before_add_and_reported_after_del() {
    // cri-o#2849: after a reboot a recycled /proc/PID/ns/net is the host's own.
    let own = [("CNI_NETNS", "/proc/self/ns/net")];
    let plugin = Recorder::default();
    assert_eq!(refused(&call(&plugin, "ADD", &own, &conf("1.1.0")), "1.1.0"), 8);
    assert!(plugin.asked.borrow().is_empty());
    // What the attachment held is released all the same, or it would leak.
    assert_eq!(refused(&call(&plugin, "DEL", &own, &conf("1.1.0")), "1.1.0"), 8);
    assert_eq!(plugin.asked.borrow().len(), 1);
    for permitted in ["1", "true", "TRUE"] {
        let own = [own[0], ("CNI_NETNS_OVERRIDE", permitted)];
        assert!(call(&Recorder::default(), "ADD", &own, &conf("1.1.0")).success);
    }
}

#[test]
fn gc_tells_no_list_from_an_empty_one() {
    let with = |extra: &str| format!(r#"{{"cniVersion":"1.1.0","name":"net"{extra}}}"#);
    for (extra, seen) in [
        ("", "GC None"),
        (r#","cni.dev/valid-attachments":null"#, "GC None"),
        (r#","cni.dev/valid-attachments":[]"#, "GC Some([])"),
        (r#","cni.dev/valid-attachments":[{"containerID":"a","ifname":"eth0"}]"#, "GC Some([\"a/eth0\"])"),
        (r#","cni.dev/attachments":[{"containerID":"b","ifname":"eth1"}]"#, "GC Some([\"b/eth1\"])"),
    ] {
        let plugin = Recorder::default();
        assert!(call(&plugin, "GC", &[], with(extra).as_bytes()).success);
        assert_eq!(*plugin.asked.borrow(), [seen]);
    }
}

#[test]
fn a_configuration_of_five_megabytes_is_read() {
    let filler = "x".repeat(5 << 20);
    let conf = json!({"cniVersion": "1.1.0", "name": "net", "filler": filler}).to_string();
    assert!(call(&Recorder::default(), "ADD", &[], conf.as_bytes()).success);
}

#[test]
fn stdin_that_cannot_be_read_is_code_5() {
    struct Broken;
    impl std::io::Read for Broken {
        fn read(&mut self, _: &mut [u8]) -> std::io::Result<usize> {
            Err(std::io::Error::other("gone"))
        }
    }
    let reply = serve(&Recorder::default(), &environment("ADD", &[]), &mut Broken);
    assert_eq!(refused(&reply, "1.1.0"), 5);
    let reply = serve(&Recorder::default(), &environment("ADD", &[]), &mut std::io::repeat(b' '));
    assert_eq!(refused(&reply, "1.1.0"), 5);
}
