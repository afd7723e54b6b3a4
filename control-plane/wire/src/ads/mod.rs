//! The client of delta ADS: one stream to the controller for all that a process wants to know.
//!
//! 1. The owner spawns [`run`] with a bounded channel of [`Subscription`]s and a [`Handler`].
//! 2. On each connection every subscribed name is asked for again, with the versions already
//!    held, so that only what has changed is sent.
//! 3. Each response becomes one [`Update`]; the handler takes it whole (ACK) or refuses it whole
//!    (NACK with its reason), and then the old state stays in force.
//! 4. A lost stream is opened again after a jittered, growing pause; nothing is forgotten.

mod state;

use std::{collections::VecDeque, time::Duration};

use tokio::{
    sync::mpsc,
    time::{sleep, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use crate::{
    backoff::Backoff,
    channel::{ConnectError, Controller, reasons},
    core::Node,
    discovery::{
        DeltaDiscoveryRequest, DeltaDiscoveryResponse,
        aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
    },
};
use state::State;

/// Requests on their way to the server. Full: further ones stay merged in [`State`] until there is
/// room.
const REQUESTS: usize = 8;
/// Answers to responses that wait to be sent; when as many wait, no further response is read.
const MAX_ANSWERS: usize = 64;
/// For the stream to be opened, connection included.
const OPEN_TIMEOUT: Duration = Duration::from_secs(10);
/// A response holds at most this much; far above what one needs, and bounded.
const MAX_RESPONSE_BYTES: usize = 64 * 1024 * 1024;

/// Who asks, and how patiently.
#[derive(Clone, Debug)]
pub struct ClientConfig {
    /// For the server's logs; what counts is the token. A pod's `uid` or a node's name.
    pub node_id: String,
    pub cluster: String,
    pub reconnect_base: Duration,
    pub reconnect_max: Duration,
}

impl ClientConfig {
    pub fn new(node_id: impl Into<String>, cluster: impl Into<String>) -> Self {
        Self {
            node_id: node_id.into(),
            cluster: cluster.into(),
            reconnect_base: Duration::from_millis(200),
            reconnect_max: Duration::from_secs(15),
        }
    }
}

/// A change of what one type is asked for. Names that are subscribed already are asked for again;
/// `*` ([`crate::names::WILDCARD`]) is everything.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Subscription {
    pub type_url: &'static str,
    pub subscribe: Vec<String>,
    pub unsubscribe: Vec<String>,
}

impl Subscription {
    pub fn subscribe<N: Into<String>>(
        type_url: &'static str,
        names: impl IntoIterator<Item = N>,
    ) -> Self {
        let subscribe = names.into_iter().map(Into::into).collect();
        Self {
            type_url,
            subscribe,
            unsubscribe: Vec::new(),
        }
    }

    pub fn unsubscribe<N: Into<String>>(
        type_url: &'static str,
        names: impl IntoIterator<Item = N>,
    ) -> Self {
        let unsubscribe = names.into_iter().map(Into::into).collect();
        Self {
            type_url,
            subscribe: Vec::new(),
            unsubscribe,
        }
    }
}

/// One response: what has changed in one type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Update {
    pub type_url: String,
    pub added: Vec<Added>,
    /// Names that do not exist: removed, or asked for in vain.
    pub removed: Vec<String>,
}

/// A resource that is new or has changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Added {
    pub name: String,
    pub version: String,
    /// For [`crate::resource::Resource::decode`].
    pub bytes: Vec<u8>,
}

/// What takes the updates.
pub trait Handler: Send {
    /// Takes an update whole, or refuses it whole with the reason that the server is told.
    fn apply(&mut self, update: Update) -> Result<(), String>;

    /// The stream was opened, or lost.
    fn connection(&mut self, connected: bool) {
        let _ = connected;
    }
}

/// Runs the client until every sender of `subscriptions` is gone. Dropping the future closes the
/// stream.
pub async fn run<H: Handler>(
    config: ClientConfig,
    controller: Controller,
    mut subscriptions: mpsc::Receiver<Subscription>,
    mut handler: H,
) {
    let mut state = State::default();
    let mut backoff = Backoff::new(config.reconnect_base, config.reconnect_max);
    loop {
        state.reconnected();
        // A stream that asks for nothing is not opened.
        while !state.has_request() {
            let Some(subscription) = subscriptions.recv().await else {
                return;
            };
            state.change(subscription);
        }
        let mut node = Some(node(&config));
        let first = state.first_requests(REQUESTS, &mut node);
        let lost = match open(&controller, first).await {
            Ok((requests, responses)) => {
                tracing::info!(
                    controller = controller.address,
                    "connected to the controller"
                );
                handler.connection(true);
                let mut session = Session {
                    node,
                    requests,
                    responses,
                    answers: VecDeque::new(),
                    delivered: false,
                };
                let lost = session
                    .run(&mut state, &mut subscriptions, &mut handler)
                    .await;
                handler.connection(false);
                if session.delivered {
                    backoff.reset();
                }
                lost
            }
            Err(error) => Lost::Failed(reasons(&error)),
        };
        let Lost::Failed(reason) = lost else { return };
        let pause = backoff.next_pause();
        tracing::warn!(
            controller = controller.address,
            reason,
            retry_ms = pause.as_millis(),
            "no connection to the controller; what is known stays in force"
        );
        if !pause_and_listen(pause, &mut state, &mut subscriptions).await {
            return;
        }
    }
}

/// Waits, while subscriptions are still taken so that their senders are not blocked. False where
/// the last sender is gone.
async fn pause_and_listen(
    pause: Duration,
    state: &mut State,
    subscriptions: &mut mpsc::Receiver<Subscription>,
) -> bool {
    let wait = sleep(pause);
    tokio::pin!(wait);
    loop {
        tokio::select! {
            () = &mut wait => return true,
            subscription = subscriptions.recv() => match subscription {
                Some(subscription) => state.change(subscription),
                None => return false,
            },
        }
    }
}

#[derive(Debug, thiserror::Error)]
enum OpenError {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("the controller refused the stream: {:?}: {}", .0.code(), .0.message())]
    Refused(Box<tonic::Status>),
    #[error("the controller did not answer within {OPEN_TIMEOUT:?}")]
    TimedOut,
}

type Stream = (
    mpsc::Sender<DeltaDiscoveryRequest>,
    Streaming<DeltaDiscoveryResponse>,
);

/// Opens a stream whose first requests are sent with it: a server may wait for one before it
/// answers at all.
async fn open(
    controller: &Controller,
    first: Vec<DeltaDiscoveryRequest>,
) -> Result<Stream, OpenError> {
    let opened = async {
        let (requests, stream) = mpsc::channel(REQUESTS);
        for request in first {
            requests
                .try_send(request)
                .expect("there are no more than the channel holds");
        }
        let request = controller.request(ReceiverStream::new(stream)).await?;
        let mut client = AggregatedDiscoveryServiceClient::new(controller.connect().await?)
            .max_decoding_message_size(MAX_RESPONSE_BYTES);
        let responses = client
            .delta_aggregated_resources(request)
            .await
            .map_err(|status| OpenError::Refused(Box::new(status)))?;
        Ok((requests, responses.into_inner()))
    };
    timeout(OPEN_TIMEOUT, opened)
        .await
        .unwrap_or(Err(OpenError::TimedOut))
}

fn node(config: &ClientConfig) -> Node {
    Node {
        id: config.node_id.clone(),
        cluster: config.cluster.clone(),
        metadata: None,
        user_agent_name: "turnpike".to_owned(),
        user_agent_version: env!("CARGO_PKG_VERSION").to_owned(),
    }
}

enum Lost {
    /// Nobody wants anything any more.
    Closed,
    Failed(String),
}

/// One stream.
struct Session {
    /// Sent with the first request.
    node: Option<Node>,
    requests: mpsc::Sender<DeltaDiscoveryRequest>,
    responses: Streaming<DeltaDiscoveryResponse>,
    answers: VecDeque<DeltaDiscoveryRequest>,
    /// A response came: the server works, the next pause is short again.
    delivered: bool,
}

impl Session {
    /// Reads and writes side by side: waiting for one never stops the other, so that two full
    /// directions cannot block each other.
    async fn run(
        &mut self,
        state: &mut State,
        subscriptions: &mut mpsc::Receiver<Subscription>,
        handler: &mut impl Handler,
    ) -> Lost {
        loop {
            let to_send = !self.answers.is_empty() || state.has_request();
            tokio::select! {
                permit = self.requests.reserve(), if to_send => {
                    // Why, the response side says.
                    let Ok(permit) = permit else { break };
                    let next = self.answers.pop_front().or_else(|| state.next_request());
                    if let Some(mut request) = next {
                        request.node = self.node.take();
                        permit.send(request);
                    }
                }
                subscription = subscriptions.recv() => match subscription {
                    Some(subscription) => state.change(subscription),
                    None => return Lost::Closed,
                },
                response = self.responses.message(), if self.answers.len() < MAX_ANSWERS => {
                    match response {
                        Ok(Some(response)) => {
                            self.delivered = true;
                            self.answers.push_back(answer(response, state, handler));
                        }
                        Ok(None) => return Lost::Failed("the controller ended the stream".into()),
                        Err(status) => return failed(&status),
                    }
                }
            }
        }
        self.reason().await
    }

    async fn reason(&mut self) -> Lost {
        match timeout(OPEN_TIMEOUT, self.responses.message()).await {
            Ok(Err(status)) => failed(&status),
            _ => Lost::Failed("the controller ended the stream".into()),
        }
    }
}

fn failed(status: &tonic::Status) -> Lost {
    Lost::Failed(format!("{:?}: {}", status.code(), reasons(status)))
}

/// Gives a response to the handler, and acknowledges or refuses it.
fn answer(
    response: DeltaDiscoveryResponse,
    state: &mut State,
    handler: &mut impl Handler,
) -> DeltaDiscoveryRequest {
    let mut request = DeltaDiscoveryRequest {
        type_url: response.type_url.clone(),
        response_nonce: response.nonce.clone(),
        ..Default::default()
    };
    let result = state.wanted(response).and_then(|update| {
        let held = state::Held::of(&update);
        if !update.added.is_empty() || !update.removed.is_empty() {
            handler.apply(update)?;
        }
        state.accept(held);
        Ok(())
    });
    if let Err(message) = result {
        tracing::warn!(type_url = request.type_url, message, "refused an update");
        request.error_detail = Some(crate::rpc::Status {
            code: tonic::Code::InvalidArgument as i32,
            message,
        });
    }
    request
}
