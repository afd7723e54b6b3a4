//! The one call to the node's agent.

use std::{io, time::Duration};

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::{
    Request, Response, Status,
    transport::{Channel, Endpoint},
};
use turnpike_wire::node::{
    self, AddReply, AddRequest, CheckReply, DelRequest, GcRequest, StatusRequest,
    cni_client::CniClient,
};

use crate::{
    error::{CniError, Code},
    input::{Attachment, Config, Invocation, ValidAttachment},
};

/// How long each command may take, where the configuration does not say. A runtime allows about two
/// minutes; STATUS is asked every few seconds.
const ADD_DEADLINE: Duration = Duration::from_secs(60);
const DEL_DEADLINE: Duration = Duration::from_secs(30);
const CHECK_DEADLINE: Duration = Duration::from_secs(30);
const GC_DEADLINE: Duration = Duration::from_secs(60);
const STATUS_DEADLINE: Duration = Duration::from_secs(5);

/// Where the agent is, not yet connected to.
#[derive(Debug)]
pub struct Agent<'a> {
    config: &'a Config,
    cni_version: &'a str,
}

impl<'a> Agent<'a> {
    pub fn new(invocation: &'a Invocation) -> Self {
        Self {
            config: &invocation.config,
            cni_version: &invocation.cni_version,
        }
    }

    pub async fn add(&self, attachment: &Attachment) -> Result<AddReply, CniError> {
        let request = self.add_request(attachment);
        let failed = self.failed("ADD", Code::TRY_AGAIN_LATER);
        self.call(ADD_DEADLINE, async |client, deadline| {
            client.add(within(deadline, request)).await
        })
        .await
        .map_err(failed)
    }

    pub async fn check(&self, attachment: &Attachment) -> Result<CheckReply, CniError> {
        let request = self.add_request(attachment);
        let failed = self.failed("CHECK", Code::TRY_AGAIN_LATER);
        self.call(CHECK_DEADLINE, async |client, deadline| {
            client.check(within(deadline, request)).await
        })
        .await
        .map_err(failed)
    }

    pub async fn del(&self, attachment: &Attachment) -> Result<(), CniError> {
        let Attachment {
            container_id,
            ifname,
            netns,
            pod_namespace,
            pod_name,
            pod_uid: _,
        } = attachment.clone();
        let network = self.config.name.clone();
        let request = DelRequest {
            container_id,
            netns,
            ifname,
            network,
            pod_namespace,
            pod_name,
        };
        let failed = self.failed("DEL", Code::TRY_AGAIN_LATER);
        self.call(DEL_DEADLINE, async |client, deadline| {
            client.del(within(deadline, request)).await
        })
        .await
        .map(drop)
        .map_err(failed)
    }

    /// A node without a free address is full, not broken: what STATUS fails for, the agent says.
    pub async fn status(&self) -> Result<(), CniError> {
        let failed = self.failed("STATUS", Code::NOT_AVAILABLE);
        self.call(STATUS_DEADLINE, async |client, deadline| {
            client.status(within(deadline, StatusRequest {})).await
        })
        .await
        .map(drop)
        .map_err(failed)
    }

    pub async fn gc(&self, valid: &[ValidAttachment]) -> Result<(), CniError> {
        let valid = valid.iter().map(|it| node::Attachment {
            container_id: it.container_id.clone(),
            ifname: it.ifname.clone(),
        });
        let request = GcRequest {
            network: self.config.name.clone(),
            valid: valid.collect(),
        };
        let failed = self.failed("GC", Code::TRY_AGAIN_LATER);
        self.call(GC_DEADLINE, async |client, deadline| {
            client.gc(within(deadline, request)).await
        })
        .await
        .map(drop)
        .map_err(failed)
    }

    fn add_request(&self, attachment: &Attachment) -> AddRequest {
        let Attachment {
            container_id,
            ifname,
            netns,
            pod_namespace,
            pod_name,
            pod_uid,
        } = attachment.clone();
        let network = self.config.name.clone();
        AddRequest {
            container_id,
            netns,
            ifname,
            network,
            pod_namespace,
            pod_name,
            pod_uid,
        }
    }

    async fn call<T>(
        &self,
        deadline: Duration,
        ask: impl AsyncFnOnce(&mut CniClient<Channel>, Duration) -> Result<Response<T>, Status>,
    ) -> Result<T, Failure> {
        let deadline = self.config.timeout.unwrap_or(deadline);
        let whole = async {
            let stream = UnixStream::connect(&self.config.agent_socket).await;
            let channel = channel(stream.map_err(Failure::Unreachable)?).await?;
            let reply = ask(&mut CniClient::new(channel), deadline).await;
            reply.map(Response::into_inner).map_err(Failure::Refused)
        };
        tokio::time::timeout(deadline, whole)
            .await
            .unwrap_or(Err(Failure::Late(deadline)))
    }

    /// `absent` is the code for an agent that cannot be reached or is not able to serve now.
    fn failed(&self, command: &'static str, absent: Code) -> impl FnOnce(Failure) -> CniError {
        let socket = self.config.agent_socket.display().to_string();
        let version = self.cni_version.to_owned();
        move |failure| {
            let error = match failure {
                Failure::Unreachable(error) => CniError::new(
                    absent,
                    format!("turnpike-node does not answer at {socket}"),
                    error.to_string(),
                ),
                Failure::Transport(error) => {
                    let message = format!("talking to turnpike-node at {socket} failed");
                    CniError::new(absent, message, error.to_string())
                }
                Failure::Late(deadline) => {
                    let message =
                        format!("turnpike-node took longer than {deadline:?} for {command}");
                    CniError::new(absent, message, "")
                }
                Failure::Refused(status) => refused(command, &status, absent),
            };
            error.for_version(&version)
        }
    }
}

#[derive(Debug)]
enum Failure {
    Unreachable(io::Error),
    Transport(tonic::transport::Error),
    Late(Duration),
    Refused(Status),
}

/// The connection is made once, and by us, so that an agent which is away is told from one that
/// fails.
async fn channel(stream: UnixStream) -> Result<Channel, Failure> {
    let mut stream = Some(stream);
    let connector = tower::service_fn(move |_| {
        let once = stream.take().map(TokioIo::new).ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::NotConnected,
                "the agent closed the connection",
            )
        });
        std::future::ready(once)
    });
    // The name goes into `:authority` and nowhere else.
    let endpoint = Endpoint::from_static("http://turnpike-node");
    endpoint
        .connect_with_connector(connector)
        .await
        .map_err(Failure::Transport)
}

fn within<T>(deadline: Duration, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(deadline);
    request
}

fn refused(command: &str, status: &Status, absent: Code) -> CniError {
    use tonic::Code as Grpc;
    let code = match status.code() {
        Grpc::InvalidArgument => Code::INVALID_CONFIG,
        Grpc::NotFound => Code::UNKNOWN_CONTAINER,
        Grpc::Unavailable
        | Grpc::ResourceExhausted
        | Grpc::Aborted
        | Grpc::Cancelled
        | Grpc::DeadlineExceeded => absent,
        Grpc::FailedPrecondition if absent == Code::NOT_AVAILABLE => Code::LIMITED_CONNECTIVITY,
        Grpc::FailedPrecondition => Code::TRY_AGAIN_LATER,
        _ => Code::AGENT_FAILED,
    };
    let message = format!("turnpike-node refused {command}: {}", status.message());
    CniError::new(code, message, format!("gRPC status {:?}", status.code()))
}
