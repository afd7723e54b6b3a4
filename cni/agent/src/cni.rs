//! The runtime's side: gRPC for the CNI executable.
//!
//! A caller that goes away does not stop what it began: each operation runs to its end as a task
//! of the node's. The CNI executable makes CNI's error codes of gRPC's.

use std::{collections::BTreeSet, future::Future, sync::Arc, time::Instant};

use tonic::{Code, Request, Response, Status};
use turnpike_datapath::{ApplyError, Error as DatapathError};
use turnpike_ipam::Attachment;
use turnpike_wire::node::{
    AddReply, AddRequest, CheckReply, DelReply, DelRequest, GcReply, GcRequest, StatusReply,
    StatusRequest, cni_server,
};

use crate::{
    attach::{self, AttachError},
    node::Node,
};

#[derive(Clone, Debug)]
pub struct CniService(pub Arc<Node>);

impl CniService {
    /// Runs the operation to its end, whether or not the caller waits for it.
    async fn run<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
    ) -> Result<T, Status> {
        let done = self.0.work.spawn(work).await;
        done.map_err(|error| Status::internal(format!("the operation broke: {error}")))
    }
}

#[tonic::async_trait]
impl cni_server::Cni for CniService {
    async fn add(&self, request: Request<AddRequest>) -> Result<Response<AddReply>, Status> {
        let (node, request) = (Arc::clone(&self.0), request.into_inner());
        let begun = Instant::now();
        let AddRequest {
            pod_namespace,
            pod_name,
            container_id,
            ..
        } = request.clone();
        let added = self
            .run(async move { attach::add(&node, &request).await })
            .await?;
        self.0.metrics.adds.inc();
        self.0
            .metrics
            .add_seconds
            .0
            .observe(begun.elapsed().as_secs_f64());
        match added {
            Ok(reply) => {
                let address = &reply.address;
                tracing::info!(pod_namespace, pod_name, container_id, address, "pod added");
                Ok(Response::new(reply))
            }
            Err(error) => {
                self.0.metrics.errors.inc();
                tracing::warn!(pod_namespace, pod_name, container_id, %error, "ADD failed");
                Err(error.into())
            }
        }
    }

    async fn del(&self, request: Request<DelRequest>) -> Result<Response<DelReply>, Status> {
        let DelRequest {
            container_id,
            ifname,
            pod_namespace,
            pod_name,
            ..
        } = request.into_inner();
        self.0.metrics.dels.inc();
        tracing::info!(pod_namespace, pod_name, container_id, "pod deleted");
        let node = Arc::clone(&self.0);
        let attachment = Attachment {
            container_id,
            ifname,
        };
        self.run(async move { attach::del(&node, &attachment).await })
            .await?;
        Ok(Response::new(DelReply {}))
    }

    async fn check(&self, request: Request<AddRequest>) -> Result<Response<CheckReply>, Status> {
        let (node, request) = (Arc::clone(&self.0), request.into_inner());
        let address = self
            .run(async move { attach::check(&node, &request).await })
            .await??;
        Ok(Response::new(CheckReply {
            address: format!("{address}/32"),
        }))
    }

    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusReply>, Status> {
        let node = &self.0;
        if !node.is_warm() {
            return Err(Status::unavailable(
                "EC2 has not said yet which addresses this node holds; see the agent's log",
            ));
        }
        // A full node is not a broken one: kubelet would take the node out of service.
        Ok(Response::new(StatusReply {}))
    }

    async fn gc(&self, request: Request<GcRequest>) -> Result<Response<GcReply>, Status> {
        let GcRequest { network, valid } = request.into_inner();
        let valid: BTreeSet<_> = valid
            .into_iter()
            .map(|it| Attachment {
                container_id: it.container_id,
                ifname: it.ifname,
            })
            .collect();
        let node = Arc::clone(&self.0);
        let removed = self
            .run(async move { attach::collect(&node, &network, &valid).await })
            .await?;
        Ok(Response::new(GcReply { removed }))
    }
}

impl From<AttachError> for Status {
    fn from(error: AttachError) -> Self {
        let code = match &error {
            // The namespace is gone: nothing is left to clean up.
            AttachError::Datapath(ApplyError {
                cause: DatapathError::Netns { .. },
                ..
            })
            | AttachError::Unknown(_) => Code::NotFound,
            AttachError::Invalid { .. } => Code::InvalidArgument,
            AttachError::PolicyMissing { .. }
            | AttachError::NoAddress { .. }
            | AttachError::Busy(_)
            | AttachError::Undeleted(_) => Code::Unavailable,
            AttachError::CalledOff => Code::Aborted,
            AttachError::Differs(_) => Code::FailedPrecondition,
            AttachError::NotRecorded(_)
            | AttachError::Datapath(_)
            | AttachError::Uncheckable(_) => Code::Internal,
        };
        Self::new(code, error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn an_error_says_whether_to_try_again_and_what_is_missing() {
        let error = AttachError::PolicyMissing {
            namespace: "shop".into(),
            name: "cart".into(),
            waited: Duration::from_secs(10),
            link: "there is no connection to the controller",
        };
        let status = Status::from(error);
        assert_eq!(status.code(), Code::Unavailable);
        assert!(
            status.message().contains("shop/cart"),
            "{}",
            status.message()
        );
        assert!(status.message().contains("no connection to the controller"));
    }
}
