//! What the API answers, in the element names of EC2's model.

use quick_xml::se::to_string_with_root;
use serde::Serialize;
use uuid::Uuid;

use crate::world::{Refusal, Tags};

const NAMESPACE: &str = "http://ec2.amazonaws.com/doc/2016-11-15/";

/// `<name>value</name>`; a name that is not an element's is left out.
pub(super) fn element<T: Serialize>(name: &str, value: &T) -> String {
    to_string_with_root(name, value).unwrap_or_else(|error| {
        tracing::error!(name, %error, "an answer cannot be written as XML");
        String::new()
    })
}

pub(super) fn success(action: &str, request_id: Uuid, body: &str) -> String {
    format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<{action}Response xmlns=\"{NAMESPACE}\">\
         <requestId>{request_id}</requestId>{body}</{action}Response>"
    )
}

pub(super) fn failure(request_id: Uuid, refusal: &Refusal) -> String {
    let (code, message) = (
        element("Code", &refusal.code),
        element("Message", &refusal.message),
    );
    format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Response><Errors><Error>{code}{message}\
         </Error></Errors><RequestID>{request_id}</RequestID></Response>"
    )
}

/// `<…Set><item>…</item></…Set>`.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Items<T> {
    item: Vec<T>,
}

impl<T> FromIterator<T> for Items<T> {
    fn from_iter<I: IntoIterator<Item = T>>(items: I) -> Self {
        Self {
            item: items.into_iter().collect(),
        }
    }
}

#[derive(Clone, Debug, Serialize)]
pub(super) struct Tag {
    key: String,
    value: String,
}

pub(super) fn tag_set(tags: &Tags) -> Items<Tag> {
    tags.iter()
        .map(|(key, value)| Tag {
            key: key.clone(),
            value: value.clone(),
        })
        .collect()
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct NetworkInterface {
    pub(super) network_interface_id: String,
    pub(super) subnet_id: String,
    pub(super) vpc_id: String,
    /// Not where it is part of an instance.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) availability_zone: Option<String>,
    pub(super) description: String,
    pub(super) owner_id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) requester_managed: Option<bool>,
    pub(super) status: &'static str,
    pub(super) mac_address: String,
    pub(super) private_ip_address: String,
    pub(super) private_dns_name: String,
    pub(super) source_dest_check: bool,
    pub(super) group_set: Items<Group>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) attachment: Option<Attachment>,
    pub(super) private_ip_addresses_set: Items<PrivateIp>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) ipv4_prefix_set: Option<Items<Ipv4Prefix>>,
    pub(super) ipv6_addresses_set: Items<Ipv6Address>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) ipv6_prefix_set: Option<Items<Ipv6Prefix>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) tag_set: Option<Items<Tag>>,
    pub(super) interface_type: &'static str,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Group {
    pub(super) group_id: String,
    pub(super) group_name: String,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Attachment {
    pub(super) attachment_id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) instance_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) instance_owner_id: Option<String>,
    pub(super) device_index: u32,
    pub(super) network_card_index: u32,
    pub(super) status: &'static str,
    pub(super) attach_time: String,
    pub(super) delete_on_termination: bool,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct PrivateIp {
    pub(super) private_ip_address: String,
    pub(super) private_dns_name: String,
    pub(super) primary: bool,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Ipv4Prefix {
    pub(super) ipv4_prefix: String,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Ipv6Address {
    pub(super) ipv6_address: String,
    pub(super) is_primary_ipv6: bool,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Ipv6Prefix {
    pub(super) ipv6_prefix: String,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Subnet {
    pub(super) subnet_id: String,
    pub(super) subnet_arn: String,
    pub(super) state: &'static str,
    pub(super) vpc_id: String,
    pub(super) owner_id: String,
    pub(super) cidr_block: String,
    pub(super) ipv6_cidr_block_association_set: Items<Ipv6Association>,
    pub(super) available_ip_address_count: u32,
    pub(super) availability_zone: String,
    pub(super) availability_zone_id: String,
    pub(super) default_for_az: bool,
    pub(super) map_public_ip_on_launch: bool,
    pub(super) assign_ipv6_address_on_creation: bool,
    pub(super) tag_set: Items<Tag>,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Ipv6Association {
    pub(super) association_id: String,
    pub(super) ipv6_cidr_block: String,
    pub(super) ipv6_cidr_block_state: State,
}

#[derive(Clone, Debug, Serialize)]
pub(super) struct State {
    pub(super) state: &'static str,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Reservation {
    pub(super) reservation_id: String,
    pub(super) owner_id: String,
    pub(super) group_set: Items<Group>,
    pub(super) instances_set: Items<Instance>,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Instance {
    pub(super) instance_id: String,
    pub(super) image_id: &'static str,
    pub(super) instance_state: InstanceState,
    pub(super) private_dns_name: String,
    pub(super) private_ip_address: String,
    pub(super) instance_type: &'static str,
    pub(super) launch_time: String,
    pub(super) placement: Placement,
    pub(super) subnet_id: String,
    pub(super) vpc_id: String,
    pub(super) architecture: &'static str,
    pub(super) hypervisor: &'static str,
    pub(super) source_dest_check: bool,
    pub(super) group_set: Items<Group>,
    pub(super) network_interface_set: Items<NetworkInterface>,
    pub(super) tag_set: Items<Tag>,
}

#[derive(Clone, Debug, Serialize)]
pub(super) struct InstanceState {
    pub(super) code: u32,
    pub(super) name: &'static str,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Placement {
    pub(super) availability_zone: String,
    pub(super) tenancy: &'static str,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct InstanceType {
    pub(super) instance_type: &'static str,
    pub(super) current_generation: bool,
    pub(super) bare_metal: bool,
    pub(super) hypervisor: &'static str,
    pub(super) v_cpu_info: VCpus,
    pub(super) memory_info: Memory,
    pub(super) network_info: NetworkInfo,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct VCpus {
    pub(super) default_v_cpus: u32,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Memory {
    pub(super) size_in_mi_b: u32,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct NetworkInfo {
    pub(super) maximum_network_interfaces: usize,
    pub(super) maximum_network_cards: u32,
    pub(super) default_network_card_index: u32,
    pub(super) network_cards: Items<NetworkCard>,
    pub(super) ipv4_addresses_per_interface: usize,
    pub(super) ipv6_addresses_per_interface: usize,
    pub(super) ipv6_supported: bool,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct NetworkCard {
    pub(super) network_card_index: u32,
    pub(super) maximum_network_interfaces: usize,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_escaped_and_lists_have_items() {
        let tags = Tags::from([("a<b".into(), "c&d".into())]);
        let xml = element("tagSet", &tag_set(&tags));
        assert_eq!(
            xml,
            "<tagSet><item><key>a&lt;b</key><value>c&amp;d</value></item></tagSet>"
        );
        assert_eq!(element("tagSet", &tag_set(&Tags::new())), "<tagSet/>");
        let refusal = Refusal::invalid("<script>");
        assert!(failure(Uuid::nil(), &refusal).contains("<Message>&lt;script&gt;</Message>"));
    }

    /// Spellings of EC2's model that no rule of letter case gives.
    #[test]
    fn odd_names_are_ec2s() {
        let memory = element("memoryInfo", &Memory { size_in_mi_b: 4096 });
        assert_eq!(
            memory,
            "<memoryInfo><sizeInMiB>4096</sizeInMiB></memoryInfo>"
        );
        let vcpus = element("vCpuInfo", &VCpus { default_v_cpus: 2 });
        assert_eq!(vcpus, "<vCpuInfo><defaultVCpus>2</defaultVCpus></vCpuInfo>");
        let prefix = element(
            "item",
            &Ipv4Prefix {
                ipv4_prefix: "10.0.0.16/28".into(),
            },
        );
        assert_eq!(prefix, "<item><ipv4Prefix>10.0.0.16/28</ipv4Prefix></item>");
        let v6 = Ipv6Address {
            ipv6_address: "::1".into(),
            is_primary_ipv6: true,
        };
        assert!(element("item", &v6).contains("<isPrimaryIpv6>"));
    }
}
