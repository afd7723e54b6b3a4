//! The gRPC service: one task a stream, between the hub and the client.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};
use turnpike_model::{Changes, Model};
use turnpike_wire::discovery::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse,
    aggregated_discovery_service_server::{
        AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
    },
};

use crate::{
    Adoption, Caller, Counters, SubscriberStatus,
    hub::{Hub, RequestError},
    subscriber::SubscriberId,
};

/// A request holds names and versions only.
const MAX_REQUEST_BYTES: usize = 16 << 20;

/// For a client to take the reason why its stream ends.
const LAST_WORD: Duration = Duration::from_secs(2);

/// The discovery service and the model it serves. Clones share both.
#[derive(Clone, Debug)]
pub struct Discovery {
    hub: Arc<Mutex<Hub>>,
    stop: CancellationToken,
}

impl Discovery {
    pub fn new(model: Model) -> Self {
        Self {
            hub: Arc::new(Mutex::new(Hub::new(model))),
            stop: CancellationToken::new(),
        }
    }

    /// Changes the model, and tells who watches what that touched.
    pub fn update(&self, change: impl FnOnce(&mut Model) -> Changes) -> Changes {
        let mut hub = self.hub.lock();
        let changes = change(&mut hub.model);
        hub.publish(&changes);
        changes
    }

    /// Looks at the model. It stands still meanwhile: do nothing slow in here.
    pub fn read<R>(&self, look: impl FnOnce(&Model) -> R) -> R {
        look(&self.hub.lock().model)
    }

    pub fn status(&self) -> Vec<SubscriberStatus> {
        self.hub.lock().status()
    }

    pub fn subscribers(&self) -> usize {
        self.hub.lock().subscribers()
    }

    pub fn counters(&self) -> Counters {
        self.hub.lock().counters()
    }

    /// How far resources have come with those who watch them.
    pub fn adoption(&self, of: &Changes) -> Adoption {
        self.hub.lock().adoption(of)
    }

    /// Ends every stream, so that clients go to another controller or come back later.
    pub fn stop(&self) {
        self.stop.cancel();
    }

    /// For tonic's router. Requests must carry an `Arc<Caller>` in their extensions.
    pub fn service(&self) -> AggregatedDiscoveryServiceServer<impl AggregatedDiscoveryService> {
        AggregatedDiscoveryServiceServer::new(Server(self.clone()))
            .max_decoding_message_size(MAX_REQUEST_BYTES)
    }
}

struct Server(Discovery);

#[tonic::async_trait]
impl AggregatedDiscoveryService for Server {
    type DeltaAggregatedResourcesStream = ReceiverStream<Result<DeltaDiscoveryResponse, Status>>;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let caller = request.extensions().get::<Arc<Caller>>().cloned();
        let caller = caller.ok_or_else(|| Status::unauthenticated("no caller is known"))?;
        let Discovery { hub, stop } = self.0.clone();
        let joined = hub.lock().join(caller.clone(), SystemTime::now());
        let id = joined.map_err(|full| Status::resource_exhausted(full.to_string()))?;
        // Full: the client does not read. What changes meanwhile stays marked in the hub.
        let (responses, stream) = mpsc::channel(1);
        let session = Session {
            hub,
            id,
            caller,
            responses,
            stop,
        };
        tokio::spawn(session.run(request.into_inner()));
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

/// Ends when the client goes, errs or is refused, when its token ends, and on stop.
struct Session {
    hub: Arc<Mutex<Hub>>,
    id: SubscriberId,
    caller: Arc<Caller>,
    responses: mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>,
    stop: CancellationToken,
}

impl Drop for Session {
    fn drop(&mut self) {
        self.hub.lock().leave(self.id);
    }
}

impl Session {
    async fn run(self, mut requests: Streaming<DeltaDiscoveryRequest>) {
        let expiry = self.expiry();
        let stop = self.stop.clone();
        let end = tokio::select! {
            end = self.converse(&mut requests) => end,
            () = expiry => Some(Status::unauthenticated(
                "the token of this stream has ended; connect again with a fresh one",
            )),
            () = stop.cancelled() => Some(Status::unavailable("the controller is stopping")),
        };
        if let Some(status) = end {
            tracing::info!(
                identity = %self.caller.identity,
                code = ?status.code(),
                reason = status.message(),
                "discovery stream ended"
            );
            // A client that does not read is not waited for any longer.
            let _ = tokio::time::timeout(LAST_WORD, self.responses.send(Err(status))).await;
        }
    }

    /// Reads and writes side by side: a client that does not read can still be heard, and one that
    /// floods us with requests can still be told.
    async fn converse(&self, requests: &mut Streaming<DeltaDiscoveryRequest>) -> Option<Status> {
        let wake = self.hub.lock().subscriber(self.id)?.wake.clone();
        let mut pending = false;
        loop {
            tokio::select! {
                request = requests.message() => match request {
                    Ok(Some(request)) => {
                        if let Err(error) = self.request(request) {
                            return Some(error);
                        }
                        pending = true;
                    }
                    Ok(None) => return None,
                    Err(status) => {
                        tracing::debug!(identity = %self.caller.identity, %status, "stream lost");
                        return None;
                    }
                },
                () = wake.notified(), if !pending => pending = true,
                permit = self.responses.reserve(), if pending => {
                    let Ok(permit) = permit else { return None };
                    let response = self.hub.lock().next_response(self.id);
                    match response {
                        Some(response) => permit.send(Ok(response)),
                        None => pending = false,
                    }
                }
            }
        }
    }

    fn request(&self, request: DeltaDiscoveryRequest) -> Result<(), Status> {
        if let Some(refusal) = &request.error_detail {
            let reason: String = refusal.message.chars().take(1024).collect();
            tracing::warn!(
                identity = %self.caller.identity,
                pod = self.caller.pod.as_ref().map(|pod| &*pod.name),
                type_url = request.type_url,
                reason,
                "a subscriber refused an update and keeps what it had"
            );
        }
        let taken = self.hub.lock().request(self.id, request, SystemTime::now());
        taken.map_err(|error| match error {
            RequestError::UnknownType(_) | RequestError::NameTooLong(_) => {
                Status::invalid_argument(error.to_string())
            }
            RequestError::Denied(_) => Status::permission_denied(error.to_string()),
            RequestError::TooManyNames => Status::resource_exhausted(error.to_string()),
        })
    }

    fn expiry(&self) -> impl Future<Output = ()> + use<> {
        let left = self
            .caller
            .expires
            .map(|at| at.duration_since(SystemTime::now()));
        async move {
            match left {
                Some(left) => tokio::time::sleep(left.unwrap_or_default()).await,
                None => std::future::pending().await,
            }
        }
    }
}
