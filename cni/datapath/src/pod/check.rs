//! What is, against what should be.

use std::{collections::BTreeSet, net::IpAddr};

use netlink_packet_route::{AddressFamily, RouteNetlinkMessage, address::AddressAttribute};
use nix::sched::{CloneFlags, unshare};

use super::{container_in, host_route, pod_routes, rules};
use crate::{
    Applied, Error, PodPlan, capture,
    host::Host,
    links::{self, Link, Route},
    marks,
    netlink::Rtnl,
    netns::Netns,
    nft,
    ruleset::read,
};

/// Every difference, in words.
pub(crate) async fn check(
    host: &Host,
    plan: &PodPlan,
    applied: &Applied,
) -> Result<Vec<String>, Error> {
    plan.validate()?;
    let mut differences = Vec::new();
    let (wanted, node) = (applied.clone(), plan.node.clone());
    differences.extend(
        host.run(move |rtnl| host_side(rtnl, &wanted, &node))
            .await?,
    );
    differences.extend(rule_side(plan, applied).await?);
    match Netns::open(&plan.netns) {
        Ok(netns) => differences.extend(pod_side(&netns, plan, applied).await?),
        Err(gone) => differences.push(gone.to_string()),
    }
    Ok(differences)
}

fn host_side(rtnl: &mut Rtnl, wanted: &Applied, node: &[IpAddr]) -> Result<Vec<String>, Error> {
    let name = &wanted.host_interface;
    let Some(link) = Link::find(rtnl, name)? else {
        return Ok(vec![format!("{name} is not there")]);
    };
    let mut differences = Vec::new();
    let container = link.alias.as_deref().and_then(container_in);
    if container != Some(&wanted.container_id) {
        differences.push(format!(
            "{name} belongs to container {}",
            container.unwrap_or("?")
        ));
    }
    if link.mac != Some(wanted.host_mac) {
        differences.push(format!("{name} has another MAC than {}", wanted.host_mac));
    }
    state(&link, wanted.mtu, &mut differences);
    for &address in &wanted.addresses {
        let route = host_route(address, link.index, node);
        let there = Route::all(rtnl, route.v6, route.table)
            .map_err(Error::kernel("listing the routes to pods"))?;
        if !there.contains(&route) {
            let table = marks::PODS_TABLE;
            differences.push(format!(
                "{address} is not routed to {name} in table {table}"
            ));
        }
    }
    Ok(differences)
}

/// The kernel's elements that speak of the pod, against those that the plan wants.
async fn rule_side(plan: &PodPlan, applied: &Applied) -> Result<Vec<String>, Error> {
    let wanted = rules(plan, applied).elements();
    let read = tokio::task::spawn_blocking(read::elements)
        .await
        .map_err(|_| Error::Closed)??;
    let concerned: BTreeSet<_> = read
        .into_iter()
        .filter(|element| element.concerns(&applied.host_interface, &applied.addresses))
        .collect();
    let missing = wanted
        .difference(&concerned)
        .map(|element| format!("no rule for {element:?}"));
    let excess = concerned
        .difference(&wanted)
        .map(|element| format!("a rule too many for {element:?}"));
    Ok(missing.chain(excess).collect())
}

async fn pod_side(netns: &Netns, plan: &PodPlan, applied: &Applied) -> Result<Vec<String>, Error> {
    let wanted = applied.clone();
    let text = plan
        .capture
        .as_ref()
        .map(|it| capture::render(it, &plan.addresses, &plan.node));
    let (mut differences, listing) = netns
        .run(move || {
            Ok((
                links_inside(&mut Rtnl::open()?, &wanted)?,
                capture_listing()?,
            ))
        })
        .await?;
    let expected = match text {
        Some(text) => Some(expected_listing(text).await?),
        None => None,
    };
    match (expected, listing) {
        (Some(_), None) => differences.push("the pod's traffic is not captured".to_owned()),
        (None, Some(_)) => differences.push("the pod's traffic is captured".to_owned()),
        (Some(expected), Some(listing)) if expected != listing => {
            differences.push("the capture in the pod was changed".to_owned());
        }
        _ => {}
    }
    Ok(differences)
}

fn links_inside(rtnl: &mut Rtnl, wanted: &Applied) -> Result<Vec<String>, Error> {
    let name = &wanted.ifname;
    let Some(link) = Link::find(rtnl, name)? else {
        return Ok(vec![format!("{name} is not in the pod")]);
    };
    let mut differences = Vec::new();
    if link.mac != Some(wanted.pod_mac) {
        differences.push(format!("{name} has another MAC than {}", wanted.pod_mac));
    }
    state(&link, wanted.mtu, &mut differences);
    let present = addresses(rtnl, link.index)?;
    for &address in &wanted.addresses {
        let v6 = address.is_ipv6();
        if !present.contains(&address) {
            differences.push(format!("the pod does not have {address}"));
        }
        let routes =
            Route::all(rtnl, v6, super::MAIN).map_err(Error::kernel("listing the pod's routes"))?;
        for route in pod_routes(v6, link.index) {
            if !routes.contains(&route) {
                let to = route.to.map_or("default".to_owned(), |to| to.to_string());
                differences.push(format!("the pod has no route {to} by {name}"));
            }
        }
    }
    Ok(differences)
}

fn state(link: &Link, mtu: u32, differences: &mut Vec<String>) {
    let name = &link.name;
    if !link.up {
        differences.push(format!("{name} is down"));
    }
    if link.mtu != mtu {
        differences.push(format!("{name} has MTU {} instead of {mtu}", link.mtu));
    }
}

fn addresses(rtnl: &mut Rtnl, index: u32) -> Result<Vec<IpAddr>, Error> {
    let found = rtnl
        .ask(true, links::all_addresses(AddressFamily::Unspec))
        .map_err(Error::kernel("listing the pod's addresses"))?;
    let on_link = found.into_iter().filter_map(|message| match message {
        RouteNetlinkMessage::NewAddress(message) if message.header.index == index => {
            Some(message.attributes)
        }
        _ => None,
    });
    let address = |attribute| match attribute {
        AddressAttribute::Address(address) => Some(address),
        _ => None,
    };
    Ok(on_link.flatten().filter_map(address).collect())
}

/// What nft says stands; None: nothing of ours. In the calling thread's namespace.
fn capture_listing() -> Result<Option<String>, Error> {
    match nft::run(
        "the capture",
        &["-s", "-n", "list", "table", "inet", "turnpike"],
        "",
    ) {
        Err(Error::Nft { message, .. }) if message.contains("No such file or directory") => {
            Ok(None)
        }
        other => other.map(Some),
    }
}

/// What nft would say: the same rules in a namespace made for the purpose, since one version of nft
/// writes them differently from the next.
async fn expected_listing(text: String) -> Result<String, Error> {
    let scratch = move || {
        unshare(CloneFlags::CLONE_NEWNET)
            .map_err(|errno| Error::kernel("making a namespace to compare with")(errno.into()))?;
        nft::transact("the capture to compare with", &text)?;
        Ok(capture_listing()?.unwrap_or_default())
    };
    // A thread of its own, for it never comes back to the node's namespace.
    let task = tokio::task::spawn_blocking(|| std::thread::spawn(scratch).join());
    task.await
        .map_err(|_| Error::Closed)?
        .map_err(|_| Error::Closed)?
}
