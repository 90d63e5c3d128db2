//! Follows the cluster's nodes: list, watch, and again from the start when the server says so.
//!
//! Like kube's own watcher, with three differences: it tells when the server was last heard (bookmarks count), it
//! takes a page-wise list where streaming lists are not served (`sendInitialEvents`, Kubernetes 1.32 by
//! default), and it never waits without a bound. It decides nothing: what is believed is [`super::follow`]'s.

use super::{
    annotations::Node,
    api::{self, ANSWER_WITHIN, connect},
    backoff::{Backoff, random},
    node::{NodeList, SlimNode},
};
use crate::flags::ApiAddress;
use futures_util::{Stream, StreamExt};
use kube::{
    Client,
    core::{
        Request, WatchEvent,
        params::{ListParams, WatchParams},
    },
};
use std::{
    pin::{Pin, pin},
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{
    sync::{Notify, mpsc},
    time::timeout,
};

/// Nodes per page: the peak of memory where lists are not streamed. Twice as many are hardly quicker.
const PAGE: u32 = 100;
/// Between two nodes of a list. A server that ignores `sendInitialEvents` is silent after the last.
const LIST_GAP: Duration = Duration::from_secs(10);
/// Bookmarks come once a minute: without any sign for longer, the server is not there.
const SILENT: Duration = Duration::from_secs(150);
/// A connection that lasted so long was a good one: the next try need not wait.
const LASTED: Duration = Duration::from_secs(10);

/// What was heard.
#[derive(Debug)]
pub enum Heard {
    /// A complete list begins.
    Listing,
    /// A node is there, new or altered or listed.
    Node(Box<Node>),
    /// The list is complete.
    Listed,
    /// The server says that the node is gone.
    Deleted(String),
    /// The server is there.
    Contact,
    /// It is not, or what it says is of no use; with the reason.
    Lost(String),
}

/// Why following ended, and where the next try begins.
enum End {
    /// The stream came to its end.
    Closed,
    /// A complete list is asked for.
    AskedAgain,
    /// The server does not stream lists.
    NotStreamed,
    /// The version is too old, or what was said makes no sense: begin anew.
    Anew(String),
    /// The connection failed; the place in the stream is still good.
    Failed(String),
    /// Nobody listens any more.
    Stopped,
}

/// Where in the stream of changes we are.
struct Place {
    version: Option<String>,
    streaming: bool,
}

/// Tells what is heard, until nobody listens. `again` asks for a complete list.
pub async fn watch(address: ApiAddress, again: Arc<Notify>, to: mpsc::Sender<Heard>) {
    let mut place = Place { version: None, streaming: true };
    let mut backoff = Backoff::default();
    loop {
        let began = Instant::now();
        let end = match connect(&address).await {
            Ok(client) => follow(&client, &mut place, &again, &to).await,
            Err(why) => End::Failed(why),
        };
        let lasted = began.elapsed() >= LASTED;
        let why = match end {
            End::Stopped => return,
            End::AskedAgain => {
                place.version = None;
                continue;
            }
            End::NotStreamed => {
                log::info!("the API server does not stream lists; reading pages");
                place = Place { version: None, streaming: false };
                continue;
            }
            End::Closed if lasted => continue,
            End::Closed => "the API server ends the watch at once".into(),
            End::Anew(why) => {
                place.version = None;
                why
            }
            End::Failed(why) => why,
        };
        if lasted {
            backoff.reset();
        }
        if to.send(Heard::Lost(why)).await.is_err() {
            return;
        }
        // Being asked for a list does not shorten the wait: it is why the next try is made anyway.
        tokio::time::sleep(backoff.next(random())).await;
    }
}

/// One client's life: list if need be, then watch.
async fn follow(client: &Client, place: &mut Place, again: &Notify, to: &mpsc::Sender<Heard>) -> End {
    if place.version.is_none() && !place.streaming {
        match list(client, to).await {
            Ok(version) => place.version = Some(version),
            Err(end) => return end,
        }
    }
    let listing = place.version.is_none();
    let params = WatchParams {
        bookmarks: true,
        send_initial_events: listing,
        timeout: Some(240 + (random() * 50.0) as u32),
        ..WatchParams::default()
    };
    let version = place.version.clone().unwrap_or_default();
    let request = match Request::new("/api/v1/nodes").watch(&params, &version) {
        Ok(request) => request,
        Err(e) => return End::Failed(e.to_string()),
    };
    let stream = match timeout(ANSWER_WITHIN, client.request_events::<SlimNode>(request)).await {
        Ok(Ok(stream)) => stream,
        // "sendInitialEvents is forbidden for watch unless the WatchList feature gate is enabled"
        Ok(Err(kube::Error::Api(status))) if listing && matches!(status.code, 400 | 422) => {
            return End::NotStreamed;
        }
        Ok(Err(e)) => return failed(&e),
        Err(_) => return End::Failed(no_answer("a watch")),
    };
    if listing && to.send(Heard::Listing).await.is_err() {
        return End::Stopped;
    }
    events(pin!(stream), place, again, to).await
}

/// Reads a watch. Without a version it is a streamed list until a bookmark says that all is told.
async fn events(
    mut stream: Pin<&mut impl Stream<Item = kube::Result<WatchEvent<SlimNode>>>>,
    place: &mut Place,
    again: &Notify,
    to: &mpsc::Sender<Heard>,
) -> End {
    loop {
        let listing = place.version.is_none();
        let patience = if listing { LIST_GAP } else { SILENT };
        let event = tokio::select! {
            biased;
            () = again.notified(), if !listing => return End::AskedAgain,
            event = timeout(patience, stream.next()) => event,
        };
        let (heard, version) = match event {
            Err(_) if listing => return End::NotStreamed,
            Err(_) => {
                return End::Failed(format!("the API server has been silent for {} s", SILENT.as_secs()));
            }
            Ok(None) if listing => return End::Anew("the API server ended a list half-way".into()),
            Ok(None) => return End::Closed,
            Ok(Some(Err(e))) => return failed(&e),
            Ok(Some(Ok(WatchEvent::Added(node) | WatchEvent::Modified(node)))) => {
                let version = node.resource_version().to_owned();
                (Heard::Node(Box::new(node.into())), version)
            }
            Ok(Some(Ok(WatchEvent::Deleted(node)))) => {
                let version = node.resource_version().to_owned();
                (Heard::Deleted(Node::from(node).name), version)
            }
            Ok(Some(Ok(WatchEvent::Bookmark(mark)))) => {
                let version = mark.metadata.resource_version;
                if listing && mark.metadata.annotations.contains_key("k8s.io/initial-events-end") {
                    place.version = Some(version.clone());
                    (Heard::Listed, version)
                } else {
                    (Heard::Contact, version)
                }
            }
            // "the required storage feature RequestWatchProgress is disabled", with an old etcd. Whatever it is, a
            // list page by page asks less of the server (client-go's reflector does the same).
            Ok(Some(Ok(WatchEvent::Error(status)))) if listing => {
                log::debug!("streamed list: {} {}", status.code, status.message);
                return End::NotStreamed;
            }
            Ok(Some(Ok(WatchEvent::Error(status)))) => {
                return End::Anew(format!(
                    "the API server ends the watch: {} {}",
                    status.code, status.message
                ));
            }
        };
        // The versions within a list are the nodes' own, not the list's.
        if place.version.is_some() && !version.is_empty() {
            place.version = Some(version);
        }
        if to.send(heard).await.is_err() {
            return End::Stopped;
        }
    }
}

/// Lists page by page; the version from which a watch goes on.
async fn list(client: &Client, to: &mpsc::Sender<Heard>) -> Result<String, End> {
    let mut params = ListParams::default().limit(PAGE);
    to.send(Heard::Listing).await.map_err(|_| End::Stopped)?;
    loop {
        let request = Request::new("/api/v1/nodes").list(&params).map_err(|e| End::Failed(e.to_string()))?;
        let page = timeout(ANSWER_WITHIN, client.request::<NodeList>(request)).await;
        let page = page.map_err(|_| End::Failed(no_answer("a list")))?.map_err(|e| failed(&e))?;
        for node in page.items {
            to.send(Heard::Node(Box::new(node.into()))).await.map_err(|_| End::Stopped)?;
        }
        if page.metadata.continue_.is_empty() {
            if page.metadata.resource_version.is_empty() {
                return Err(End::Failed("the API server's list has no version".into()));
            }
            to.send(Heard::Listed).await.map_err(|_| End::Stopped)?;
            return Ok(page.metadata.resource_version);
        }
        params.continue_token = Some(page.metadata.continue_);
    }
}

fn failed(error: &kube::Error) -> End {
    let why = api::said(error);
    match error {
        // The version is gone, or what came is no JSON: only a new list helps.
        kube::Error::Api(status) if status.code == 410 => End::Anew(why),
        kube::Error::SerdeError(_) => End::Anew(why),
        _ => End::Failed(why),
    }
}

fn no_answer(to: &str) -> String {
    format!("the API server does not answer {to} within {} s", ANSWER_WITHIN.as_secs())
}
