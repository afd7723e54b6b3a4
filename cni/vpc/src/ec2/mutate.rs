//! The actions that change something: read, checked, carried into world and fabric.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use serde::Serialize;

use super::{
    describe,
    params::Params,
    xml::{Items, element},
};
use crate::{
    cloud::Cloud,
    world::{AttachmentId, InstanceId, InterfaceId, NewInterface, Refusal, Wanted},
};

const ACTIONS: [&str; 8] = [
    "CreateNetworkInterface",
    "AttachNetworkInterface",
    "ModifyNetworkInterfaceAttribute",
    "AssignPrivateIpAddresses",
    "UnassignPrivateIpAddresses",
    "DetachNetworkInterface",
    "DeleteNetworkInterface",
    "CreateTags",
];

pub(super) fn knows(action: &str) -> bool {
    ACTIONS.contains(&action)
}

pub(super) async fn answer(
    cloud: &Cloud,
    action: &str,
    params: &Params,
) -> Result<String, Refusal> {
    match action {
        "CreateNetworkInterface" => create(cloud, params).await,
        "AttachNetworkInterface" => attach(cloud, params).await,
        "ModifyNetworkInterfaceAttribute" => modify(cloud, params).await,
        "AssignPrivateIpAddresses" => assign(cloud, params).await,
        "UnassignPrivateIpAddresses" => unassign(cloud, params).await,
        "DetachNetworkInterface" => detach(cloud, params).await,
        "DeleteNetworkInterface" => delete(cloud, params).await,
        "CreateTags" => tag(cloud, params).await,
        _ => Err(Refusal::unknown_action(action)),
    }
}

async fn create(cloud: &Cloud, params: &Params) -> Result<String, Refusal> {
    let asked = new_interface(params)?;
    let token = params.get("ClientToken").map(String::from);
    params.refuse_dry_run()?;
    let made = cloud.change(|world, now| {
        let id = world.create(asked, token, now)?;
        let interface = world.interface(&id)?;
        Ok(describe::network_interface(world, interface, &|at| {
            cloud.wall(at)
        }))
    });
    let body = element("networkInterface", &made.await?);
    let echoed = params
        .get("ClientToken")
        .map_or_else(String::new, |t| element("clientToken", &t));
    Ok(body + &echoed)
}

async fn attach(cloud: &Cloud, params: &Params) -> Result<String, Refusal> {
    let id = interface(params)?;
    let instance = InstanceId::from(params.required("InstanceId")?);
    let device = params
        .typed("DeviceIndex")?
        .ok_or_else(|| Refusal::missing("DeviceIndex"))?;
    if params
        .typed::<u32>("NetworkCardIndex")?
        .is_some_and(|card| card != 0)
    {
        return Err(Refusal::invalid(
            "NetworkCardIndex: the instance has one network card, 0",
        ));
    }
    params.refuse_dry_run()?;
    let attached = cloud
        .change(|world, now| world.attach(&id, &instance, device, now))
        .await?;
    Ok(element("attachmentId", &attached.as_str()) + &element("networkCardIndex", &0))
}

async fn modify(cloud: &Cloud, params: &Params) -> Result<String, Refusal> {
    let id = interface(params)?;
    let description = params.get("Description.Value").map(String::from);
    let source_check = params.typed::<bool>("SourceDestCheck.Value")?;
    let groups: Vec<String> = params
        .list("SecurityGroupId")
        .into_iter()
        .map(Into::into)
        .collect();
    let attachment = params
        .get("Attachment.AttachmentId")
        .map(AttachmentId::from);
    let on_termination = params.typed::<bool>("Attachment.DeleteOnTermination")?;
    let given = [
        description.is_some(),
        source_check.is_some(),
        !groups.is_empty(),
        on_termination.is_some(),
    ];
    if given.into_iter().filter(|given| *given).count() != 1 {
        let message = "Exactly one attribute is modified by a call: Description, SourceDestCheck, \
                       SecurityGroupId or Attachment";
        return Err(Refusal::combination(message));
    }
    params.refuse_dry_run()?;
    let changed = cloud.change(|world, _| {
        if let Some(text) = description {
            world.set_description(&id, text)
        } else if let Some(on) = source_check {
            world.set_source_check(&id, on)
        } else if let Some(on) = on_termination {
            let attachment =
                attachment.ok_or_else(|| Refusal::missing("Attachment.AttachmentId"))?;
            world.set_delete_on_termination(&id, &attachment, on)
        } else {
            world.set_groups(&id, &groups)
        }
    });
    changed.await?;
    Ok(done())
}

async fn assign(cloud: &Cloud, params: &Params) -> Result<String, Refusal> {
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Single {
        private_ip_address: String,
    }
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Prefix {
        ipv4_prefix: String,
    }
    let id = interface(params)?;
    let single = wanted::<Ipv4Addr>(params, "PrivateIpAddress", "SecondaryPrivateIpAddressCount")?;
    let prefixes = wanted::<Ipv4Net>(params, "Ipv4Prefix", "Ipv4PrefixCount")?;
    let reassign = params.typed("AllowReassignment")?.unwrap_or(false);
    let given = cloud
        .change(|world, _| world.assign(&id, &single, &prefixes, reassign))
        .await?;
    let addresses: Items<_> = given
        .single
        .iter()
        .map(|a| Single {
            private_ip_address: a.to_string(),
        })
        .collect();
    let blocks: Items<_> = given
        .prefixes
        .iter()
        .map(|net| Prefix {
            ipv4_prefix: net.to_string(),
        })
        .collect();
    Ok(element("networkInterfaceId", &id.as_str())
        + &element("assignedPrivateIpAddressesSet", &addresses)
        + &element("assignedIpv4PrefixSet", &blocks)
        + &done())
}

async fn unassign(cloud: &Cloud, params: &Params) -> Result<String, Refusal> {
    let id = interface(params)?;
    let single = params.typed_list::<Ipv4Addr>("PrivateIpAddress")?;
    let prefixes = params.typed_list::<Ipv4Net>("Ipv4Prefix")?;
    cloud
        .change(|world, _| world.unassign(&id, &single, &prefixes))
        .await?;
    Ok(done())
}

async fn detach(cloud: &Cloud, params: &Params) -> Result<String, Refusal> {
    let id = AttachmentId::from(params.required("AttachmentId")?);
    params.typed::<bool>("Force")?;
    params.refuse_dry_run()?;
    cloud.change(|world, now| world.detach(&id, now)).await?;
    Ok(done())
}

async fn delete(cloud: &Cloud, params: &Params) -> Result<String, Refusal> {
    let id = interface(params)?;
    params.refuse_dry_run()?;
    cloud.change(|world, _| world.delete(&id)).await?;
    Ok(done())
}

async fn tag(cloud: &Cloud, params: &Params) -> Result<String, Refusal> {
    let resources: Vec<&str> = params.list("ResourceId");
    let tags = params.tags("")?;
    if resources.is_empty() {
        return Err(Refusal::missing("ResourceId"));
    }
    if tags.is_empty() {
        return Err(Refusal::missing("Tag"));
    }
    params.refuse_dry_run()?;
    let tagged = cloud.change(|world, _| {
        resources
            .iter()
            .try_for_each(|resource| world.tag(resource, &tags))
    });
    tagged.await?;
    Ok(done())
}

fn new_interface(params: &Params) -> Result<NewInterface, Refusal> {
    let mut primary = params.typed::<Ipv4Addr>("PrivateIpAddress")?;
    let mut named = Vec::new();
    // `PrivateIpAddresses.N.{PrivateIpAddress,Primary}`: one may be the primary.
    for index in 1.. {
        let key = format!("PrivateIpAddresses.{index}");
        let Some(address) = params.typed(&format!("{key}.PrivateIpAddress"))? else {
            break;
        };
        if params.typed(&format!("{key}.Primary"))?.unwrap_or(false) {
            if primary.replace(address).is_some() {
                return Err(Refusal::combination("Only one address can be the primary"));
            }
        } else {
            named.push(address);
        }
    }
    let count = params.typed::<usize>("SecondaryPrivateIpAddressCount")?;
    let secondary = match (named.is_empty(), count) {
        (true, count) => Wanted::Any(count.unwrap_or(0)),
        (false, None) => Wanted::These(named),
        (false, Some(_)) => {
            let message = "SecondaryPrivateIpAddressCount excludes PrivateIpAddresses";
            return Err(Refusal::combination(message));
        }
    };
    Ok(NewInterface {
        subnet: params.required("SubnetId")?.into(),
        description: params.get("Description").unwrap_or_default().into(),
        groups: params
            .list("SecurityGroupId")
            .into_iter()
            .map(Into::into)
            .collect(),
        primary,
        secondary,
        prefixes: wanted::<Ipv4Net>(params, "Ipv4Prefix", "Ipv4PrefixCount")?,
        tags: params.specified_tags("network-interface")?,
    })
}

fn interface(params: &Params) -> Result<InterfaceId, Refusal> {
    params.required("NetworkInterfaceId")?.parse()
}

fn wanted<T: std::str::FromStr>(
    params: &Params,
    list: &str,
    count: &str,
) -> Result<Wanted<T>, Refusal> {
    let these = params.typed_list::<T>(list)?;
    match (these.is_empty(), params.typed::<usize>(count)?) {
        (true, any) => Ok(Wanted::Any(any.unwrap_or(0))),
        (false, None) => Ok(Wanted::These(these)),
        (false, Some(_)) => Err(Refusal::combination(format!("{list} excludes {count}"))),
    }
}

fn done() -> String {
    element("return", &true)
}
