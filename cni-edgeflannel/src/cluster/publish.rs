//! Tells the cluster about this node: flannel's annotations and the condition NetworkUnavailable=False.
//!
//! One patch of `nodes/NAME/status`, as flanneld makes it, and only when something differs. Tried until it is
//! taken or until there is something else to say; a refusal is reported and never stops anything else.

use super::{
    api::{ANSWER_WITHIN, connect, said},
    backoff::{Backoff, random},
};
use crate::flags::ApiAddress;
use kube::core::{
    Request,
    params::{Patch, PatchParams},
};
use serde::Deserialize;
use serde_json::Value;
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};

/// Publishes whatever `wanted` holds, whenever it changes, until its sender is gone. `None` is nothing to say.
pub async fn publish(address: ApiAddress, node: String, mut wanted: watch::Receiver<Option<Value>>) {
    let mut backoff = Backoff::default();
    loop {
        let Some(patch) = wanted.borrow_and_update().clone() else {
            if wanted.changed().await.is_err() {
                return;
            }
            continue;
        };
        let wait = match send(&address, &node, &patch).await {
            Ok(()) => {
                log::info!("published {patch}");
                backoff.reset();
                None
            }
            Err(why) => {
                log::warn!("publish to our Node {node}: {why}");
                Some(backoff.next(random()))
            }
        };
        let changed = match wait {
            None => wanted.changed().await,
            Some(wait) => tokio::select! {
                changed = wanted.changed() => changed,
                () = sleep(wait) => Ok(()),
            },
        };
        if changed.is_err() {
            return;
        }
    }
}

/// The answer is the whole Node; nothing of it is needed.
#[derive(Deserialize)]
struct Taken {}

async fn send(address: &ApiAddress, node: &str, patch: &Value) -> Result<(), String> {
    let client = connect(address).await?;
    let params = PatchParams { field_manager: Some("edgeflanneld".into()), ..PatchParams::default() };
    let request = Request::new("/api/v1/nodes")
        .patch_subresource("status", node, &params, &Patch::Strategic(patch))
        .map_err(|e| e.to_string())?;
    match timeout(ANSWER_WITHIN, client.request::<Taken>(request)).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(e)) => Err(said(&e)),
        Err(_) => Err(format!("no answer within {} s", ANSWER_WITHIN.as_secs())),
    }
}
