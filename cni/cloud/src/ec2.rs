//! [`Cloud`] on the AWS SDK.

use std::{
    collections::BTreeMap,
    future::Future,
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use aws_config::{BehaviorVersion, imds, retry::RetryConfig, timeout::TimeoutConfig};
use aws_sdk_ec2::{
    Client,
    error::{ProvideErrorMetadata, SdkError},
    types::{
        AttachmentStatus, Filter, InstanceType, NetworkInterface,
        NetworkInterfaceAttachmentChanges, NetworkInterfaceStatus, ResourceType, Tag,
        TagSpecification,
    },
};
use parking_lot::Mutex;

use crate::{
    Attachment, AttachmentState, Cloud, CloudError, Instance, Interface, NewInterface, Subnet,
    TypeLimits, Wanted, bucket::Bucket, error::from_sdk, metadata,
};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
const CALL_TIMEOUT: Duration = Duration::from_secs(15);
const ATTEMPTS: u32 = 4;
const FIRST_PAUSE: Duration = Duration::from_millis(400);
const LONGEST_PAUSE: Duration = Duration::from_secs(8);

/// How fast this node may ask, as bursts and calls per second. An account's own limits are about
/// 100 and 20 for what describes, 50 and 5 for what changes, for all its nodes together.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pace {
    pub describe: (u32, f64),
    pub change: (u32, f64),
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            describe: (10, 2.0),
            change: (10, 2.0),
        }
    }
}

/// The real thing, or whatever speaks as it does at the SDK's endpoints.
#[derive(Debug)]
pub struct Ec2 {
    client: Client,
    imds: imds::Client,
    describes: Mutex<Bucket>,
    changes: Mutex<Bucket>,
}

/// Whether a second try can do harm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Repeat {
    /// Reads, and what has a token or names exactly what is to be.
    Safe,
    /// Only if EC2 said that it did nothing.
    IfNothingDone,
}

impl Ec2 {
    pub async fn connect(pace: Pace) -> Self {
        let timeouts = TimeoutConfig::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .operation_attempt_timeout(CALL_TIMEOUT)
            .build();
        // Retries are ours: each attempt pays a token, and not every call may be repeated.
        let config = aws_config::defaults(BehaviorVersion::latest())
            .retry_config(RetryConfig::disabled())
            .timeout_config(timeouts)
            .load()
            .await;
        let now = Instant::now();
        Self {
            client: Client::new(&config),
            imds: imds::Client::builder().build(),
            describes: Mutex::new(Bucket::new(pace.describe.0, pace.describe.1, now)),
            changes: Mutex::new(Bucket::new(pace.change.0, pace.change.1, now)),
        }
    }

    async fn call<T, E, F>(
        &self,
        operation: &'static str,
        repeat: Repeat,
        call: impl Fn() -> F,
    ) -> Result<T, CloudError>
    where
        F: Future<Output = Result<T, SdkError<E>>>,
        E: ProvideErrorMetadata + std::error::Error + 'static,
    {
        let bucket = if operation.starts_with("Describe") {
            &self.describes
        } else {
            &self.changes
        };
        let mut attempt = 1;
        loop {
            let wait = bucket.lock().take(Instant::now());
            tokio::time::sleep(wait).await;
            let error = match Box::pin(call()).await {
                Ok(answer) => return Ok(answer),
                Err(error) => from_sdk(operation, error),
            };
            let again = match &error {
                CloudError::Throttled { .. } => {
                    bucket.lock().drain();
                    true
                }
                CloudError::Unreachable { .. } => true,
                CloudError::Unknown { .. } => repeat == Repeat::Safe,
                _ => false,
            };
            if !again || attempt == ATTEMPTS {
                return Err(error);
            }
            let pause = pause(attempt, fastrand::f64());
            tracing::debug!(operation, attempt, ?pause, %error, "EC2 is asked again");
            tokio::time::sleep(pause).await;
            attempt += 1;
        }
    }
}

/// Doubling, between half and all of it.
fn pause(attempt: u32, jitter: f64) -> Duration {
    let full = FIRST_PAUSE
        .saturating_mul(1 << (attempt - 1).min(16))
        .min(LONGEST_PAUSE);
    full.mul_f64(0.5 + jitter / 2.0)
}

impl Cloud for Ec2 {
    async fn instance(&self) -> Result<Instance, CloudError> {
        metadata::instance(&self.imds).await
    }

    async fn limits(&self, instance_type: &str) -> Result<TypeLimits, CloudError> {
        let operation = "DescribeInstanceTypes";
        let wanted = InstanceType::from(instance_type);
        let answer = self
            .call(operation, Repeat::Safe, || {
                self.client
                    .describe_instance_types()
                    .instance_types(wanted.clone())
                    .send()
            })
            .await?;
        let info = answer
            .instance_types()
            .first()
            .and_then(|it| it.network_info());
        let missing = |what| CloudError::Incomplete { operation, what };
        let info = info.ok_or(missing("network info"))?;
        // Pods use the default card; on types with several, its own limit counts.
        let card = info.network_cards().iter().find(|card| {
            card.network_card_index() == Some(info.default_network_card_index().unwrap_or(0))
        });
        let interfaces = card
            .and_then(|card| card.maximum_network_interfaces())
            .or(info.maximum_network_interfaces())
            .ok_or(missing("interface limit"))?;
        let addresses = info
            .ipv4_addresses_per_interface()
            .ok_or(missing("address limit"))?;
        Ok(TypeLimits {
            interfaces: u32::try_from(interfaces).map_err(|_| missing("interface limit"))?,
            addresses_per_interface: u32::try_from(addresses)
                .map_err(|_| missing("address limit"))?,
        })
    }

    async fn subnets(&self, ids: &[String]) -> Result<Vec<Subnet>, CloudError> {
        let operation = "DescribeSubnets";
        let answer = self
            .call(operation, Repeat::Safe, || {
                self.client
                    .describe_subnets()
                    .set_subnet_ids(Some(ids.to_vec()))
                    .send()
            })
            .await?;
        let subnet = |subnet: &aws_sdk_ec2::types::Subnet| {
            Some(Subnet {
                id: subnet.subnet_id()?.to_owned(),
                zone: subnet.availability_zone().unwrap_or_default().to_owned(),
                cidr: subnet.cidr_block()?.parse().ok()?,
                free_addresses: u32::try_from(subnet.available_ip_address_count()?).ok()?,
            })
        };
        let subnets = answer.subnets().iter().map(|it| {
            subnet(it).ok_or(CloudError::Incomplete {
                operation,
                what: "subnet's id or range",
            })
        });
        subnets.collect()
    }

    async fn interfaces(&self, filters: &[(&str, &str)]) -> Result<Vec<Interface>, CloudError> {
        let operation = "DescribeNetworkInterfaces";
        let filters: Vec<_> = filters
            .iter()
            .map(|(name, value)| Filter::builder().name(*name).values(*value).build())
            .collect();
        let mut found = Vec::new();
        let mut next: Option<String> = None;
        loop {
            let answer = self
                .call(operation, Repeat::Safe, || {
                    self.client
                        .describe_network_interfaces()
                        .set_filters(Some(filters.clone()))
                        .set_next_token(next.clone())
                        .send()
                })
                .await?;
            for interface in answer.network_interfaces() {
                found.push(read_interface(operation, interface)?);
            }
            next = answer
                .next_token()
                .filter(|token| !token.is_empty())
                .map(str::to_owned);
            if next.is_none() {
                return Ok(found);
            }
        }
    }

    async fn create(&self, interface: &NewInterface) -> Result<Interface, CloudError> {
        let operation = "CreateNetworkInterface";
        let NewInterface {
            subnet,
            groups,
            addresses,
            description,
            tags,
            token,
        } = interface;
        let tags = TagSpecification::builder()
            .resource_type(ResourceType::NetworkInterface)
            .set_tags(Some(sdk_tags(tags)))
            .build();
        let answer = self
            .call(operation, Repeat::Safe, || {
                let request = self
                    .client
                    .create_network_interface()
                    .subnet_id(subnet)
                    .set_groups(Some(groups.clone()))
                    .description(description)
                    .tag_specifications(tags.clone())
                    .client_token(token);
                let count = (*addresses > 0).then(|| count(*addresses));
                request.set_secondary_private_ip_address_count(count).send()
            })
            .await?;
        let made = answer.network_interface();
        let made = made.ok_or(CloudError::Incomplete {
            operation,
            what: "interface",
        })?;
        read_interface(operation, made)
    }

    async fn attach(
        &self,
        interface: &str,
        instance: &str,
        device_index: u32,
    ) -> Result<String, CloudError> {
        let operation = "AttachNetworkInterface";
        let answer = self
            .call(operation, Repeat::IfNothingDone, || {
                self.client
                    .attach_network_interface()
                    .network_interface_id(interface)
                    .instance_id(instance)
                    .device_index(count(device_index))
                    .send()
            })
            .await?;
        let id = answer.attachment_id().map(str::to_owned);
        id.ok_or(CloudError::Incomplete {
            operation,
            what: "attachment's id",
        })
    }

    async fn delete_on_termination(
        &self,
        interface: &str,
        attachment: &str,
    ) -> Result<(), CloudError> {
        let change = NetworkInterfaceAttachmentChanges::builder()
            .attachment_id(attachment)
            .delete_on_termination(true)
            .build();
        self.call("ModifyNetworkInterfaceAttribute", Repeat::Safe, || {
            self.client
                .modify_network_interface_attribute()
                .network_interface_id(interface)
                .attachment(change.clone())
                .send()
        })
        .await?;
        Ok(())
    }

    async fn tag(&self, resource: &str, tags: &BTreeMap<String, String>) -> Result<(), CloudError> {
        self.call("CreateTags", Repeat::Safe, || {
            self.client
                .create_tags()
                .resources(resource)
                .set_tags(Some(sdk_tags(tags)))
                .send()
        })
        .await?;
        Ok(())
    }

    async fn detach(&self, attachment: &str) -> Result<(), CloudError> {
        self.call("DetachNetworkInterface", Repeat::IfNothingDone, || {
            self.client
                .detach_network_interface()
                .attachment_id(attachment)
                .send()
        })
        .await?;
        Ok(())
    }

    async fn delete(&self, interface: &str) -> Result<(), CloudError> {
        self.call("DeleteNetworkInterface", Repeat::Safe, || {
            self.client
                .delete_network_interface()
                .network_interface_id(interface)
                .send()
        })
        .await?;
        Ok(())
    }

    async fn assign(&self, interface: &str, wanted: &Wanted) -> Result<Vec<Ipv4Addr>, CloudError> {
        let operation = "AssignPrivateIpAddresses";
        let repeat = match wanted {
            Wanted::Count(_) => Repeat::IfNothingDone,
            Wanted::Exactly(_) => Repeat::Safe,
        };
        let answer = self
            .call(operation, repeat, || {
                let request = self
                    .client
                    .assign_private_ip_addresses()
                    .network_interface_id(interface);
                match wanted {
                    Wanted::Count(many) => request.secondary_private_ip_address_count(count(*many)),
                    Wanted::Exactly(these) => request.set_private_ip_addresses(Some(texts(these))),
                }
                .send()
            })
            .await?;
        let assigned = answer.assigned_private_ip_addresses().iter();
        assigned
            .map(|it| {
                it.private_ip_address()
                    .and_then(|address| address.parse().ok())
            })
            .collect::<Option<_>>()
            .ok_or(CloudError::Incomplete {
                operation,
                what: "assigned address",
            })
    }

    async fn unassign(&self, interface: &str, addresses: &[Ipv4Addr]) -> Result<(), CloudError> {
        self.call("UnassignPrivateIpAddresses", Repeat::IfNothingDone, || {
            self.client
                .unassign_private_ip_addresses()
                .network_interface_id(interface)
                .set_private_ip_addresses(Some(texts(addresses)))
                .send()
        })
        .await?;
        Ok(())
    }
}

fn count(number: u32) -> i32 {
    i32::try_from(number).unwrap_or(i32::MAX)
}

fn texts(addresses: &[Ipv4Addr]) -> Vec<String> {
    addresses.iter().map(ToString::to_string).collect()
}

fn sdk_tags(tags: &BTreeMap<String, String>) -> Vec<Tag> {
    tags.iter()
        .map(|(key, value)| Tag::builder().key(key).value(value).build())
        .collect()
}

fn read_interface(
    operation: &'static str,
    interface: &NetworkInterface,
) -> Result<Interface, CloudError> {
    let missing = |what| CloudError::Incomplete { operation, what };
    let address = |text: Option<&str>| text.and_then(|text| text.parse::<Ipv4Addr>().ok());
    let primary = address(interface.private_ip_address()).ok_or(missing("primary address"))?;
    let secondary = interface
        .private_ip_addresses()
        .iter()
        .filter(|it| it.primary() != Some(true))
        .filter_map(|it| address(it.private_ip_address()))
        .filter(|it| *it != primary)
        .collect();
    let tags = interface
        .tag_set()
        .iter()
        .filter_map(|tag| Some((tag.key()?.to_owned(), tag.value().unwrap_or("").to_owned())));
    Ok(Interface {
        id: interface
            .network_interface_id()
            .ok_or(missing("interface's id"))?
            .to_owned(),
        mac: interface
            .mac_address()
            .ok_or(missing("MAC address"))?
            .to_ascii_lowercase(),
        subnet: interface.subnet_id().ok_or(missing("subnet"))?.to_owned(),
        groups: interface
            .groups()
            .iter()
            .filter_map(|group| group.group_id().map(str::to_owned))
            .collect(),
        primary,
        secondary,
        available: interface.status() == Some(&NetworkInterfaceStatus::Available),
        attachment: interface.attachment().and_then(read_attachment),
        tags: tags.collect(),
    })
}

fn read_attachment(
    attachment: &aws_sdk_ec2::types::NetworkInterfaceAttachment,
) -> Option<Attachment> {
    let state = match attachment.status() {
        Some(AttachmentStatus::Attached) => AttachmentState::Attached,
        Some(AttachmentStatus::Attaching) => AttachmentState::Attaching,
        Some(_) => AttachmentState::Detaching,
        None => return None,
    };
    Some(Attachment {
        id: attachment.attachment_id()?.to_owned(),
        instance: attachment.instance_id().unwrap_or_default().to_owned(),
        device_index: u32::try_from(attachment.device_index()?).ok()?,
        network_card: u32::try_from(attachment.network_card_index().unwrap_or(0)).ok()?,
        state,
        delete_on_termination: attachment.delete_on_termination().unwrap_or(false),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_with_jitter_and_end_growing() {
        let millis = |attempt, jitter| pause(attempt, jitter).as_millis();
        assert_eq!((millis(1, 0.0), millis(1, 1.0)), (200, 400));
        assert_eq!((millis(3, 0.0), millis(3, 1.0)), (800, 1600));
        assert_eq!(millis(40, 1.0), 8000);
    }
}
