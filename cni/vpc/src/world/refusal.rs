//! The refusals of the EC2 API, with its own codes: callers decide by them.

use super::{AttachmentId, InstanceId, InterfaceId};

/// One error of the API.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{code}: {message}")]
pub struct Refusal {
    pub code: &'static str,
    pub message: String,
}

fn refusal(code: &'static str, message: impl Into<String>) -> Refusal {
    Refusal {
        code,
        message: message.into(),
    }
}

impl Refusal {
    pub fn missing(parameter: &str) -> Self {
        let message = format!("The request must contain the parameter {parameter}");
        refusal("MissingParameter", message)
    }

    pub fn invalid(message: impl Into<String>) -> Self {
        refusal("InvalidParameterValue", message)
    }

    pub fn combination(message: impl Into<String>) -> Self {
        refusal("InvalidParameterCombination", message)
    }

    pub fn invalid_instance_type(message: impl Into<String>) -> Self {
        refusal("InvalidInstanceType", message)
    }

    pub fn unknown_action(action: &str) -> Self {
        let message = format!("The action {action} is not valid for this web service.");
        refusal("InvalidAction", message)
    }

    pub fn unauthorized(message: impl Into<String>) -> Self {
        refusal("UnauthorizedOperation", message)
    }

    pub fn dry_run() -> Self {
        let message = "Request would have succeeded, but DryRun flag is set.";
        refusal("DryRunOperation", message)
    }

    pub fn throttled() -> Self {
        refusal("RequestLimitExceeded", "Request limit exceeded.")
    }

    pub fn internal() -> Self {
        refusal("InternalError", "An internal error has occurred")
    }

    pub(super) fn no_subnet(id: &str) -> Self {
        refusal(
            "InvalidSubnetID.NotFound",
            format!("The subnet ID '{id}' does not exist"),
        )
    }

    pub(super) fn no_group(id: &str) -> Self {
        let message = format!("The security group '{id}' does not exist");
        refusal("InvalidSecurityGroupID.NotFound", message)
    }

    pub(super) fn no_interface(id: &InterfaceId) -> Self {
        let message = format!("The networkInterface ID '{id}' does not exist");
        refusal("InvalidNetworkInterfaceID.NotFound", message)
    }

    pub(super) fn malformed_interface(text: &str) -> Self {
        let message = format!("Invalid id: \"{text}\" (expecting \"eni-...\")");
        refusal("InvalidNetworkInterfaceId.Malformed", message)
    }

    pub(super) fn no_instance(id: &InstanceId) -> Self {
        let message = format!("The instance ID '{id}' does not exist");
        refusal("InvalidInstanceID.NotFound", message)
    }

    pub(super) fn no_attachment(id: &AttachmentId) -> Self {
        let message = format!("The attachment ID '{id}' does not exist");
        refusal("InvalidAttachmentID.NotFound", message)
    }

    pub(super) fn interface_in_use(id: &InterfaceId) -> Self {
        let message = format!("Interface: [{id}] in use.");
        refusal("InvalidNetworkInterface.InUse", message)
    }

    pub(super) fn too_many_interfaces(count: usize, instance_type: &str) -> Self {
        let message = format!("Interface count {count} exceeds the limit for {instance_type}");
        refusal("AttachmentLimitExceeded", message)
    }

    pub(super) fn too_many_interfaces_in_account(limit: usize) -> Self {
        let message =
            format!("You have reached the limit of {limit} network interfaces in this region");
        refusal("NetworkInterfaceLimitExceeded", message)
    }

    pub(super) fn too_many_addresses(id: &InterfaceId, count: usize, limit: usize) -> Self {
        let message = format!(
            "Number of private addresses ({count}) exceeds the limit of {limit} for interface {id}"
        );
        refusal("PrivateIpAddressLimitExceeded", message)
    }

    pub(super) fn overfull_interface(id: &InterfaceId, count: usize, limit: usize) -> Self {
        let message = format!(
            "Interface {id} has {count} private addresses, which exceeds the limit of {limit} for \
             the instance type"
        );
        refusal("InvalidInterface.IpAddressLimitExceeded", message)
    }

    pub(super) fn subnet_full(id: &str) -> Self {
        let message =
            format!("The subnet {id} does not have enough free addresses to satisfy the request.");
        refusal("InsufficientFreeAddressesInSubnet", message)
    }

    pub(super) fn no_blocks(id: &str) -> Self {
        let message = format!(
            "There are not sufficient free cidr blocks in the subnet {id} to satisfy the request."
        );
        refusal("InsufficientCidrBlocks", message)
    }

    /// How CreateNetworkInterface words exhaustion when it is asked for several addresses.
    pub(super) fn subnet_full_at_create() -> Self {
        Self::invalid("There aren't sufficient free Ipv4 addresses or prefixes")
    }

    pub(super) fn address_taken(address: impl std::fmt::Display) -> Self {
        let message = format!("Address {address} is in use.");
        refusal("InvalidIPAddress.InUse", message)
    }

    pub(super) fn primary_interface() -> Self {
        let message = "The network interface at device index 0 cannot be detached.";
        refusal("OperationNotPermitted", message)
    }

    pub(super) fn state(message: impl Into<String>) -> Self {
        refusal("IncorrectState", message)
    }

    pub(super) fn token_reused() -> Self {
        let message = "The client token was used before with other parameters";
        refusal("IdempotentParameterMismatch", message)
    }

    pub(super) fn unknown_resource(id: &str) -> Self {
        refusal("InvalidID", format!("The ID '{id}' is not valid"))
    }
}
