//! One intent: the calls to EC2 that it announced, and what came of them.

use std::{collections::BTreeSet, net::Ipv4Addr, sync::Arc, time::Duration};

use tokio::sync::Mutex;
use turnpike_cloud::{
    Attachment, AttachmentState, Cloud, CloudError, Interface, NewInterface, Wanted,
};
use turnpike_datapath::Error as DatapathError;
use turnpike_ipam::{Action, Eni, EniId, Intent};

use super::{
    Done, count,
    look::{INSTANCE_TAG, TOKEN_TAG},
};
use crate::node::{Node, datapath_eni};

const POLL: Duration = Duration::from_millis(500);
/// For an attach or a detach to be through; EC2 says "up to 10 s" and means it mostly.
const STATE_CHANGE: Duration = Duration::from_secs(60);
/// For EC2 to list an attachment, where its answer did not say whether there is one; then it is asked
/// for again. Its lists lag by seconds.
const LISTED: Duration = Duration::from_secs(5);
const ATTACHES: u32 = 4;
/// For the link of an attached interface to appear in the kernel.
const LINK: Duration = Duration::from_secs(30);
const SUBNET_PAUSE: Duration = Duration::from_secs(120);
const REFUSED_PAUSE: Duration = Duration::from_secs(60);
const SHORT_PAUSE: Duration = Duration::from_secs(5);
const INSTANCE_CREATED_TAG: &str = "node.k8s.amazonaws.com/createdAt";

#[derive(Debug, thiserror::Error)]
enum CallError {
    #[error(transparent)]
    Cloud(#[from] CloudError),
    #[error("the interface's link or routes: {0}")]
    Link(#[from] DatapathError),
    #[error("{0} after {1:?}")]
    Slow(&'static str, Duration),
    #[error("pods use it")]
    InUse,
    /// What had been made is deleted again.
    #[error("{0}; undone")]
    Undone(Box<Self>),
}

/// What a call achieved.
#[derive(Default)]
struct Gain {
    created: Option<Eni>,
    addresses: Vec<Ipv4Addr>,
}

#[derive(Debug)]
pub(super) struct Caller<C> {
    node: Arc<Node>,
    cloud: Arc<C>,
    /// Device numbers are chosen from what EC2 lists: one attach at a time.
    attaching: Mutex<()>,
}

impl<C: Cloud> Caller<C> {
    pub(super) fn new(node: Arc<Node>, cloud: Arc<C>) -> Self {
        Self {
            node,
            cloud,
            attaching: Mutex::new(()),
        }
    }

    /// Runs the intent's calls and puts the outcome on record.
    pub(super) async fn run(&self, intent: Intent) -> Done {
        tracing::info!(action = ?intent.action, "asking EC2");
        let outcome = match &intent.action {
            Action::Assign { eni, count } => self.assign(eni, *count).await,
            Action::Reclaim { eni, addresses } => {
                self.assign_wanted(eni, Wanted::Exactly(addresses.clone()))
                    .await
            }
            Action::Create { addresses } => self.create(&intent, *addresses).await,
            Action::Unassign { eni, addresses } => self.unassign(eni, addresses).await,
            Action::Delete { eni } => self.delete(eni).await,
        };
        self.settle(&intent, outcome).await
    }

    async fn settle(&self, intent: &Intent, outcome: Result<Gain, CallError>) -> Done {
        let node = &self.node;
        let now = node.now();
        let (recorded, look_again) = match outcome {
            Ok(Gain { created, addresses }) => {
                let made = created.as_ref().map(|eni| eni.id.clone());
                let change = node.store.change(|pool, log| {
                    pool.finish(intent.id, created, addresses, now, log);
                    made.iter().for_each(|eni| pool.ready(eni));
                });
                (change.await.1, false)
            }
            Err(error) => {
                node.metrics.errors.inc();
                let (pause, known) = judge(&error);
                tracing::warn!(action = ?intent.action, %error, ?pause, known, "EC2 did not do it");
                let change = node.store.change(|pool, log| {
                    if known {
                        pool.fail(intent.id, pause, now, log);
                    } else {
                        pool.unknown(intent.id);
                        pool.hold_growth(pause, now);
                    }
                });
                (change.await.1, true)
            }
        };
        if let Err(error) = recorded {
            tracing::error!(%error, "what EC2 answered is not on record yet");
        }
        Done { look_again }
    }

    fn counted<T>(
        &self,
        api: &'static str,
        answer: Result<T, CloudError>,
    ) -> Result<T, CloudError> {
        count(&self.node, api, answer.as_ref().err());
        answer
    }

    /// So many; in an almost empty subnet at least one.
    async fn assign(&self, eni: &EniId, count: u32) -> Result<Gain, CallError> {
        match self.assign_wanted(eni, Wanted::Count(count)).await {
            Err(CallError::Cloud(CloudError::SubnetExhausted { .. })) if count > 1 => {
                self.assign_wanted(eni, Wanted::Count(1)).await
            }
            outcome => outcome,
        }
    }

    async fn assign_wanted(&self, eni: &EniId, wanted: Wanted) -> Result<Gain, CallError> {
        let answer = self.cloud.assign(eni.as_str(), &wanted).await;
        let addresses = self.counted("AssignPrivateIpAddresses", answer)?;
        Ok(Gain {
            created: None,
            addresses,
        })
    }

    async fn unassign(&self, eni: &EniId, addresses: &[Ipv4Addr]) -> Result<Gain, CallError> {
        let answer = self.cloud.unassign(eni.as_str(), addresses).await;
        self.counted("UnassignPrivateIpAddresses", answer)?;
        Ok(Gain::default())
    }

    /// An interface, attached, with link and routes. Begun again, it goes on where it was.
    async fn create(&self, intent: &Intent, addresses: u32) -> Result<Gain, CallError> {
        let interface = self.made(intent, addresses).await?;
        match self.attach(&interface).await {
            Ok(gain) => Ok(gain),
            // It is paid for and of no use; if it cannot be deleted now, a look will find it.
            Err(error) => match self.delete(&EniId::new(&interface.id)).await {
                Ok(_) => Err(CallError::Undone(Box::new(error))),
                Err(left) => {
                    tracing::warn!(eni = interface.id, error = %left, "an unused interface stays");
                    Err(error)
                }
            },
        }
    }

    async fn made(&self, intent: &Intent, addresses: u32) -> Result<Interface, CallError> {
        let tag = format!("tag:{TOKEN_TAG}");
        let found = self.interfaces(&[(&tag, &intent.token)]).await?.pop();
        if let Some(interface) = found {
            return Ok(interface);
        }
        let instance = &self.node.identity.instance;
        let primary = self.interface(&instance.interface).await?;
        let mut tags = self.node.settings.eni_tags.clone();
        tags.insert(INSTANCE_TAG.to_owned(), instance.id.clone());
        tags.insert(TOKEN_TAG.to_owned(), intent.token.clone());
        tags.insert(INSTANCE_CREATED_TAG.to_owned(), created_at());
        let wanted = NewInterface {
            subnet: instance.subnet.clone(),
            groups: primary.groups,
            addresses,
            description: format!("aws-K8S-{}", instance.id),
            tags,
            token: intent.token.clone(),
        };
        let answer = self.cloud.create(&wanted).await;
        Ok(self.counted("CreateNetworkInterface", answer)?)
    }

    async fn attach(&self, interface: &Interface) -> Result<Gain, CallError> {
        let attached = match &interface.attachment {
            Some(_) => interface.clone(),
            None => self.attach_now(interface).await?,
        };
        let id = &attached.id;
        let (now, attachment) = self.attached(id).await?;
        if !attachment.delete_on_termination {
            let answer = self.cloud.delete_on_termination(id, &attachment.id).await;
            self.counted("ModifyNetworkInterfaceAttribute", answer)?;
        }
        let eni = Eni {
            id: EniId::new(id),
            mac: now.mac,
            device_index: attachment.device_index,
            primary: now.primary,
            subnet: self.node.identity.instance.subnet_cidr,
        };
        ready_link(&self.node, &eni).await?;
        Ok(Gain {
            created: Some(eni),
            addresses: now.secondary,
        })
    }

    async fn attach_now(&self, interface: &Interface) -> Result<Interface, CallError> {
        let _one = self.attaching.lock().await;
        let instance = &self.node.identity.instance.id;
        let attached = self
            .interfaces(&[("attachment.instance-id", instance)])
            .await?;
        let used: BTreeSet<_> = attached
            .iter()
            .filter_map(|it| Some(it.attachment.as_ref()?.device_index))
            .collect();
        let free = (1..).find(|index| !used.contains(index)).unwrap_or(1);
        let available = |it: &Interface| it.available || it.attachment.is_some();
        let otherwise = "the interface is not available";
        self.becomes(&interface.id, STATE_CHANGE, otherwise, available)
            .await?;
        for _ in 0..ATTACHES {
            match self.cloud.attach(&interface.id, instance, free).await {
                Err(error @ CloudError::Unknown { .. }) => {
                    count(&self.node, "AttachNetworkInterface", Some(&error));
                    if self.is_listed_attached(&interface.id).await? {
                        break;
                    }
                }
                answer => {
                    self.counted("AttachNetworkInterface", answer)?;
                    break;
                }
            }
        }
        // Held until EC2 lists it, so that the next one sees its device number taken.
        self.attached(&interface.id).await?;
        self.interface(&interface.id).await
    }

    /// Whether what an answer left open was done, by EC2's list.
    async fn is_listed_attached(&self, id: &str) -> Result<bool, CallError> {
        let listed = |it: &Interface| it.attachment.is_some();
        let seen = self.becomes(id, LISTED, "no attachment is listed", listed);
        match seen.await {
            Ok(_) => Ok(true),
            Err(CallError::Slow(..)) => Ok(false),
            Err(error) => Err(error),
        }
    }

    async fn attached(&self, id: &str) -> Result<(Interface, Attachment), CallError> {
        let is_attached = |interface: &Interface| {
            let attachment = interface.attachment.as_ref();
            attachment.is_some_and(|it| it.state == AttachmentState::Attached)
        };
        let interface = self
            .becomes(
                id,
                STATE_CHANGE,
                "the interface is not attached",
                is_attached,
            )
            .await?;
        match interface.attachment.clone() {
            Some(attachment) => Ok((interface, attachment)),
            None => Err(CallError::Slow(
                "the interface is not attached",
                STATE_CHANGE,
            )),
        }
    }

    /// Waits until EC2 lists the interface as it should be. One not listed at all may be one just
    /// made: EC2's answers lag.
    async fn becomes(
        &self,
        id: &str,
        within: Duration,
        otherwise: &'static str,
        right: impl Fn(&Interface) -> bool,
    ) -> Result<Interface, CallError> {
        let wait = async {
            loop {
                match self.interface(id).await {
                    Ok(interface) if right(&interface) => return Ok(interface),
                    Ok(_) | Err(CallError::Cloud(CloudError::NotFound { .. })) => {}
                    Err(error) => return Err(error),
                }
                tokio::time::sleep(POLL).await;
            }
        };
        let waited = tokio::time::timeout(within, wait).await;
        waited.unwrap_or(Err(CallError::Slow(otherwise, within)))
    }

    /// Routes first, then EC2; what is gone already is fine. One that EC2 keeps is laid again by the
    /// look that follows a failure.
    async fn delete(&self, eni: &EniId) -> Result<Gain, CallError> {
        let interface = match self.interface(eni.as_str()).await {
            Err(CallError::Cloud(CloudError::NotFound { .. })) => return Ok(Gain::default()),
            found => found?,
        };
        if self.node.leases().iter().any(|lease| lease.eni == *eni) {
            return Err(CallError::InUse);
        }
        if let Ok(mac) = interface.mac.parse() {
            match self.node.datapath.detach_eni(mac).await {
                Ok(()) | Err(DatapathError::NoSuchEni { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        if let Some(attachment) = &interface.attachment {
            self.detach(&interface.id, attachment).await?;
        }
        match self.cloud.delete(eni.as_str()).await {
            Err(CloudError::NotFound { .. }) => {}
            answer => self.counted("DeleteNetworkInterface", answer)?,
        }
        Ok(Gain::default())
    }

    async fn detach(&self, id: &str, attachment: &Attachment) -> Result<(), CallError> {
        if attachment.state != AttachmentState::Detaching {
            let answer = self.cloud.detach(&attachment.id).await;
            self.counted("DetachNetworkInterface", answer)?;
        }
        let wait = async {
            while self.interface(id).await?.attachment.is_some() {
                tokio::time::sleep(POLL).await;
            }
            Ok(())
        };
        let waited = tokio::time::timeout(STATE_CHANGE, wait).await;
        let slow = CallError::Slow("the interface is not detached", STATE_CHANGE);
        waited.unwrap_or(Err(slow))
    }

    async fn interfaces(&self, filters: &[(&str, &str)]) -> Result<Vec<Interface>, CallError> {
        let answer = self.cloud.interfaces(filters).await;
        Ok(self.counted("DescribeNetworkInterfaces", answer)?)
    }

    async fn interface(&self, id: &str) -> Result<Interface, CallError> {
        let found = self
            .interfaces(&[("network-interface-id", id)])
            .await?
            .pop();
        found.ok_or_else(|| {
            let message = format!("the interface {id} is not listed");
            CloudError::NotFound {
                operation: "DescribeNetworkInterfaces",
                message,
            }
            .into()
        })
    }
}

/// How long EC2 is left in peace, and whether it is certain that nothing was done.
fn judge(error: &CallError) -> (Duration, bool) {
    match error {
        CallError::Cloud(CloudError::SubnetExhausted { .. }) => (SUBNET_PAUSE, true),
        CallError::Cloud(
            CloudError::Unauthorized { .. }
            | CloudError::InterfaceLimit { .. }
            | CloudError::Refused { .. },
        ) => (REFUSED_PAUSE, true),
        CallError::Cloud(error) => (SHORT_PAUSE, !error.is_unknown()),
        CallError::Link(_) | CallError::InUse => (SHORT_PAUSE, true),
        CallError::Slow(..) => (SHORT_PAUSE, false),
        CallError::Undone(error) => (judge(error).0, true),
    }
}

/// Waits for the interface's link and lays it.
async fn ready_link(node: &Node, eni: &Eni) -> Result<(), DatapathError> {
    let wait = async {
        loop {
            match lay(node, eni).await {
                Err(DatapathError::NoSuchEni { .. }) => tokio::time::sleep(POLL).await,
                done => return done,
            }
        }
    };
    match tokio::time::timeout(LINK, wait).await {
        Ok(done) => done,
        Err(_) => lay(node, eni).await,
    }
}

/// Lays the interface's link, table and rules, then lets its addresses be given out.
pub(super) async fn lay(node: &Node, eni: &Eni) -> Result<(), DatapathError> {
    if let Some(plan) = datapath_eni(eni, node.settings.eni_mtu) {
        node.datapath.attach_eni(&plan).await?;
    }
    node.store.ready(&eni.id);
    Ok(())
}

fn created_at() -> String {
    let now = time::OffsetDateTime::now_utc();
    now.format(&time::format_description::well_known::Rfc3339)
        .unwrap_or_default()
}
