//! EC2 and instance metadata, behind one small trait.
//!
//! 1. [`Ec2::connect`] reads the SDK's own settings: region, credentials, endpoints
//!    (`AWS_ENDPOINT_URL_EC2`, `AWS_EC2_METADATA_SERVICE_ENDPOINT`);
//! 2. [`Cloud::instance`] says who this machine is, from metadata;
//! 3. every call to EC2 takes from a token bucket, has a timeout, and is retried with jitter where
//!    a second try can do no harm;
//! 4. what fails is a [`CloudError`], sorted by what the caller has to do about it.
//!
//! This is the one crate that sees the AWS SDK.

mod bucket;
mod ec2;
mod error;
mod metadata;

use std::{collections::BTreeMap, future::Future, net::Ipv4Addr};

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};

pub use ec2::{Ec2, Pace};
pub use error::{CloudError, classify};

/// What a node needs of its cloud.
///
/// Every method may be dropped while it waits; whether EC2 did it is then unknown, as it is after
/// [`CloudError::Unknown`].
pub trait Cloud: Send + Sync + 'static {
    /// This machine, as its metadata service describes it.
    fn instance(&self) -> impl Future<Output = Result<Instance, CloudError>> + Send;

    /// What the instance type allows.
    fn limits(
        &self,
        instance_type: &str,
    ) -> impl Future<Output = Result<TypeLimits, CloudError>> + Send;

    fn subnets(
        &self,
        ids: &[String],
    ) -> impl Future<Output = Result<Vec<Subnet>, CloudError>> + Send;

    /// Interfaces that match all filters, by EC2's own filter names.
    fn interfaces(
        &self,
        filters: &[(&str, &str)],
    ) -> impl Future<Output = Result<Vec<Interface>, CloudError>> + Send;

    /// Makes an interface. The same token twice makes one.
    fn create(
        &self,
        interface: &NewInterface,
    ) -> impl Future<Output = Result<Interface, CloudError>> + Send;

    /// The attachment's id. The interface is there when `interfaces` says `Attached`.
    fn attach(
        &self,
        interface: &str,
        instance: &str,
        device_index: u32,
    ) -> impl Future<Output = Result<String, CloudError>> + Send;

    /// The interface is to go when its instance does.
    fn delete_on_termination(
        &self,
        interface: &str,
        attachment: &str,
    ) -> impl Future<Output = Result<(), CloudError>> + Send;

    fn tag(
        &self,
        resource: &str,
        tags: &BTreeMap<String, String>,
    ) -> impl Future<Output = Result<(), CloudError>> + Send;

    fn detach(&self, attachment: &str) -> impl Future<Output = Result<(), CloudError>> + Send;

    fn delete(&self, interface: &str) -> impl Future<Output = Result<(), CloudError>> + Send;

    /// The addresses that were assigned. Not idempotent: never repeated after
    /// [`CloudError::Unknown`] without a look first.
    fn assign(
        &self,
        interface: &str,
        wanted: &Wanted,
    ) -> impl Future<Output = Result<Vec<Ipv4Addr>, CloudError>> + Send;

    fn unassign(
        &self,
        interface: &str,
        addresses: &[Ipv4Addr],
    ) -> impl Future<Output = Result<(), CloudError>> + Send;
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Instance {
    pub id: String,
    pub instance_type: String,
    pub zone: String,
    pub vpc: String,
    /// All of the VPC's ranges.
    pub vpc_cidrs: Vec<Ipv4Net>,
    /// The interface that the instance started with.
    pub interface: String,
    /// Lower case, colons.
    pub mac: String,
    pub subnet: String,
    pub subnet_cidr: Ipv4Net,
    pub address: Ipv4Addr,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TypeLimits {
    /// Interfaces on the default network card.
    pub interfaces: u32,
    /// IPv4 addresses of one interface, its primary included.
    pub addresses_per_interface: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subnet {
    pub id: String,
    pub zone: String,
    pub cidr: Ipv4Net,
    pub free_addresses: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    pub id: String,
    pub mac: String,
    pub subnet: String,
    pub groups: Vec<String>,
    pub primary: Ipv4Addr,
    pub secondary: Vec<Ipv4Addr>,
    /// False while EC2 makes it: it cannot be attached yet.
    pub available: bool,
    pub attachment: Option<Attachment>,
    pub tags: BTreeMap<String, String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attachment {
    pub id: String,
    pub instance: String,
    pub device_index: u32,
    pub network_card: u32,
    pub state: AttachmentState,
    pub delete_on_termination: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttachmentState {
    Attaching,
    Attached,
    /// On its way out, or out.
    Detaching,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewInterface {
    pub subnet: String,
    pub groups: Vec<String>,
    /// Secondary addresses to begin with.
    pub addresses: u32,
    pub description: String,
    pub tags: BTreeMap<String, String>,
    pub token: String,
}

/// Which addresses to assign.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// So many, of EC2's choice.
    Count(u32),
    Exactly(Vec<Ipv4Addr>),
}
