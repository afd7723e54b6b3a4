//! Carries what the kernel refused to the feed, and counts what it did not log.

use std::{fs, io, path::Path, sync::Arc, time::Duration};

use turnpike_datapath::Denials;

use crate::node::Node;

const REOPEN_PAUSE: Duration = Duration::from_secs(1);
/// Of the rules' count of refused packets, as it was when it was last looked at, those that the gate
/// was told of. The rest, an agent that ends takes with it, and the next one tells how many they were.
const REFUSED: &str = "refused";
const UNTOLD_PAUSE: Duration = Duration::from_secs(2);

/// Carries the kernel's denials to the feed, until the node stops.
pub async fn forward(node: Arc<Node>) {
    while !node.stop.is_cancelled() {
        match Denials::open() {
            Ok(mut denials) => read(&node, &mut denials).await,
            Err(error) => tracing::error!(%error, "denials cannot be read from the kernel"),
        }
        let pause = tokio::time::sleep(REOPEN_PAUSE);
        node.stop.run_until_cancelled(pause).await;
    }
}

/// Tells how many refused packets were not logged, by the rules' rate or because no agent was there,
/// until the node stops. Looks only after some were logged: before that, no rate was exceeded.
pub async fn tell_untold(node: Arc<Node>) {
    let path = node.settings.state_dir.join(REFUSED);
    let mut before = node.datapath.refusals().await.unwrap_or_default();
    let known = fs::read_to_string(&path)
        .ok()
        .and_then(|text| text.parse().ok());
    let away = known.map_or(0, |known| more(known, before.all));
    if away > 0 {
        let reason = "refused packets while the agent was away, or told to nobody before, at most";
        node.feed.lapse(reason, away);
    }
    loop {
        let told = before.all.saturating_sub(node.feed.untold());
        if let Err(error) = keep(&path, told) {
            tracing::warn!(%error, "the count of refused packets was not kept");
        }
        tokio::select! {
            biased;
            () = node.stop.cancelled() => return,
            () = node.denials_seen.notified() => {}
            () = node.feed.passed_on() => continue,
        }
        let pause = tokio::time::sleep(UNTOLD_PAUSE);
        node.stop.run_until_cancelled(pause).await;
        match node.datapath.refusals().await {
            Ok(now) => {
                let untold = more(before.untold, now.untold);
                if untold > 0 {
                    let reason = "refused packets beyond what is logged of one pod in a second";
                    node.feed.lapse(reason, untold);
                }
                before = now;
            }
            Err(error) => tracing::warn!(%error, "the counters of refused packets cannot be read"),
        }
    }
}

/// A counter that is less than before was made anew.
fn more(before: u64, now: u64) -> u64 {
    now.checked_sub(before).unwrap_or(now)
}

fn keep(path: &Path, refused: u64) -> io::Result<()> {
    let new = path.with_extension("new");
    fs::write(&new, refused.to_string())?;
    fs::rename(&new, path)
}

async fn read(node: &Node, denials: &mut Denials) {
    while let Some(next) = node.stop.run_until_cancelled(denials.next()).await {
        match next {
            Ok(denied) => {
                node.metrics.denied_packets.inc_by(denied.count);
                node.feed.denied(denied);
                let overruns = denials.overruns();
                if overruns > 0 {
                    let reason = "refused packets that came faster than they were read";
                    node.feed.lapse(reason, overruns);
                }
                node.denials_seen.notify_one();
            }
            Err(error) => {
                tracing::error!(%error, "the kernel's denials are interrupted");
                return;
            }
        }
    }
}
