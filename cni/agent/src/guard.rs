//! Keeps the node's rules as they are to be, whoever else has a hand in them.

use std::{sync::Arc, time::Duration};

use turnpike_datapath::{Meddling, Watch};

use crate::node::Node;

const REOPEN_PAUSE: Duration = Duration::from_secs(1);
const MEND_PAUSE: Duration = Duration::from_millis(50);

/// Mends the node's rules when somebody else has changed them, and puts on record that for a moment
/// nobody can vouch for what left. Until the node stops.
pub async fn keep(node: Arc<Node>) {
    while !node.stop.is_cancelled() {
        match Watch::open() {
            Ok(mut watch) => {
                // What happened before the watch began.
                mend(&node, None).await;
                guard(&node, &mut watch).await;
            }
            Err(error) => tracing::error!(%error, "the node's rules cannot be watched"),
        }
        let pause = tokio::time::sleep(REOPEN_PAUSE);
        node.stop.run_until_cancelled(pause).await;
    }
}

async fn guard(node: &Node, watch: &mut Watch) {
    while let Some(seen) = node.stop.run_until_cancelled(watch.next()).await {
        match seen {
            Ok(meddling) => mend(node, Some(meddling)).await,
            Err(error) => {
                tracing::error!(%error, "the watch over the node's rules is interrupted");
                return;
            }
        }
        // One deed is many notifications, and who fights over the rules shall not have all the time.
        let pause = tokio::time::sleep(MEND_PAUSE);
        node.stop.run_until_cancelled(pause).await;
    }
}

async fn mend(node: &Node, meddling: Option<Meddling>) {
    let mended = node.datapath.repair().await;
    let Some(meddling) = meddling else {
        if let Err(error) = mended {
            tracing::error!(%error, "the node's rules cannot be written");
        }
        return;
    };
    match mended {
        Ok(()) => {
            tracing::error!(%meddling, "the node's rules were written again");
            let reason = format!("{meddling}; they were written again at once");
            node.feed.lapse(reason, 0);
        }
        Err(error) => {
            tracing::error!(%meddling, %error, "the node's rules could not be written again");
            let reason = format!("{meddling}, and they could not be written again: {error}");
            node.feed.lapse(reason, 0);
        }
    }
}
