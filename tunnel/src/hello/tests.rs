//! Hellos and answers as they go over the wire, and what is none.

use super::*;
use proptest::prelude::*;

fn hello() -> Hello {
    let id = |text| Id::parse(text).unwrap();
    Hello { instance: id("i-1"), session: id("s-1"), role: Role::Session }
}

/// Takes a frame apart as a reader of the socket does.
fn body(frame: &[u8]) -> &[u8] {
    let header = frame[..HEADER].try_into().unwrap();
    let body = &frame[HEADER..];
    assert_eq!(body_length(header), Ok(body.len()));
    body
}

#[test]
fn a_hello_on_the_wire() {
    let frame = hello().encode();
    assert_eq!(&frame, b"etun\0\x30version=1\ninstance=i-1\nsession=s-1\nrole=session\n".as_slice());
}

#[test]
fn what_is_no_hello() {
    let table = [
        ("", NotAHello::Missing),
        ("version=1\ninstance=a\nsession=b\n", NotAHello::Missing),
        ("version=1\ninstance=a\nsession=b\nrole=king\n", NotAHello::Value),
        ("version=1\ninstance=a b\nsession=b\nrole=extra\n", NotAHello::Value),
        ("version=1\ninstance=\nsession=b\nrole=extra\n", NotAHello::Value),
        ("version=2\ninstance=a\nsession=b\nrole=extra\n", NotAHello::Version),
        ("version=1\nversion=1\n", NotAHello::Twice),
        ("version\n", NotAHello::Lines),
    ];
    for (text, why) in table {
        assert_eq!(Hello::decode(text.as_bytes()), Err(why), "{text:?}");
    }
    assert_eq!(Hello::decode(b"\xff=\xff\n"), Err(NotAHello::Lines));
    assert_eq!(Hello::decode(&[b'a'; BODY_LIMIT + 1]), Err(NotAHello::TooLong));
    assert_eq!(body_length(*b"PRI * "), Err(NotAHello::Magic));
    assert_eq!(body_length(*b"etun\x04\x01"), Err(NotAHello::TooLong));
    assert_eq!(body_length(*b"etun\x04\x00"), Ok(1024));
}

#[test]
fn a_later_version_may_say_more() {
    let more = "version=1\ninstance=a\nsession=b\nrole=extra\ncolour=blue\n";
    assert_eq!(Hello::decode(more.as_bytes()).map(|hello| hello.role), Ok(Role::Extra));
    let later = "version=7\nreplica=r\nanswer=come-tomorrow\nsentence=we are closed\n";
    let (replica, why) = (Id::parse("r").unwrap(), TurnedAway::NotReady);
    let sentence = "we are closed".to_owned();
    assert_eq!(Answer::decode(later.as_bytes()), Ok(Answer::TurnedAway { replica, why, sentence }));
}

proptest! {
    #[test]
    fn what_is_said_is_heard(instance in "[A-Za-z0-9._-]{1,64}", session in "[a-z0-9]{1,64}", role in 0usize..3) {
        let id = |text: &str| Id::parse(text).unwrap();
        let hello = Hello { instance: id(&instance), session: id(&session), role: Role::WORDS[role].0 };
        prop_assert_eq!(Hello::decode(body(&hello.encode())), Ok(hello));
    }

    #[test]
    fn so_is_the_answer(replica in "[a-z0-9-]{1,64}", which in 0usize..9, sentence in ".{0,500}") {
        let replica = Id::parse(&replica).unwrap();
        let answer = match TurnedAway::WORDS.get(which) {
            Some((why, _)) => Answer::TurnedAway { replica, why: *why, sentence },
            None => Answer::Welcome { replica, replicas: sentence.len() },
        };
        let frame = answer.encode();
        let heard = Answer::decode(body(&frame)).unwrap();
        prop_assert_eq!(heard.encode(), frame);
        match (answer, heard) {
            (Answer::TurnedAway { why, .. }, Answer::TurnedAway { why: heard, .. }) => prop_assert_eq!(why, heard),
            (answer, heard) => prop_assert_eq!(answer, heard),
        }
    }

    #[test]
    fn any_bytes_are_a_hello_or_not(bytes in any::<Vec<u8>>()) {
        if let Ok(hello) = Hello::decode(&bytes) {
            prop_assert_eq!(Hello::decode(body(&hello.encode())), Ok(hello));
        }
        let _ = Answer::decode(&bytes);
    }
}
