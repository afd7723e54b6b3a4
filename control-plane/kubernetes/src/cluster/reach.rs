//! Whether the API server answers at all, said once for all kinds.

use std::time::Duration;

use kube::Client;
use tokio::{
    sync::{mpsc, watch},
    time::{sleep, timeout},
};

use super::{Message, trouble};
use crate::{Event, Impairment};

const INTERVAL: Duration = Duration::from_secs(5);
/// While it does not answer.
const RETRY: Duration = Duration::from_secs(1);
const PATIENCE: Duration = Duration::from_secs(5);
/// One lost answer is no outage.
const FAILURES: u32 = 2;

/// Asks for its version, which anybody may, until nobody listens.
pub(super) async fn run(
    client: Client,
    server: String,
    messages: mpsc::Sender<Message>,
    reachable: watch::Sender<bool>,
) {
    let mut failures = 0;
    let mut told: Option<Impairment> = None;
    loop {
        let answer = timeout(PATIENCE, client.apiserver_version()).await;
        let found = match answer {
            Ok(Ok(_)) => None,
            Ok(Err(error)) => Some(trouble::unreachable(&server, &error)),
            Err(_) => Some(trouble::silent(&server, PATIENCE)),
        };
        failures = if found.is_some() { failures + 1 } else { 0 };
        reachable.send_if_modified(|known| {
            let is = failures == 0;
            std::mem::replace(known, is) != is
        });
        if (failures == 0 || failures >= FAILURES) && told != found {
            let before = std::mem::replace(&mut told, found.clone());
            let events = before.map(Event::Restored).into_iter();
            for event in events.chain(found.map(Event::Impaired)) {
                if messages.send(Message::Event(event)).await.is_err() {
                    return;
                }
            }
        }
        let pause = if failures == 0 { INTERVAL } else { RETRY };
        sleep(pause.mul_f64(0.75 + 0.5 * fastrand::f64())).await;
    }
}
