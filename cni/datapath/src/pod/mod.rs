//! A pod's network: built step by step, undone in reverse.

mod check;

pub(crate) use check::check;

use std::net::IpAddr;

use nix::net::if_::if_nametoindex;

use crate::{
    Applied, ApplyError, Error, Mac, PodPlan, Removal, RemoveError, capture,
    host::Host,
    links::{self, End, Link, Route},
    marks,
    netlink::{CREATE, REPLACE, Request, Rtnl},
    netns::Netns,
    nft,
    ruleset::{Edit, Ruleset, elements::PodRules},
    sysctl::Sysctls,
};

const MAIN: u32 = 254;

/// Builds all of it. On failure nothing is left, unless the error says so.
pub(crate) async fn apply(
    host: &Host,
    ruleset: &Ruleset,
    plan: &PodPlan,
) -> Result<Applied, ApplyError> {
    let refused = |cause| ApplyError {
        cause,
        undo: Vec::new(),
    };
    plan.validate().map_err(refused)?;
    let netns = Netns::open(&plan.netns).map_err(refused)?;
    let applied = Applied {
        pod: plan.pod.clone(),
        container_id: plan.container_id.clone(),
        ifname: plan.ifname.clone(),
        host_interface: plan.pod.host_interface(),
        host_mac: Mac::random(),
        pod_mac: Mac::random(),
        addresses: plan.addresses.clone(),
        mtu: plan.mtu,
    };
    let mut build = Build {
        host,
        ruleset,
        plan,
        netns,
        applied,
        done: Vec::new(),
    };
    match build.run().await {
        Ok(()) => Ok(build.applied),
        Err(cause) => Err(ApplyError {
            cause,
            undo: build.undo().await,
        }),
    }
}

/// Takes all of it away; collects what stands in the way. The link goes first: while a pod can still
/// speak, its denial stands.
pub(crate) async fn remove(
    host: &Host,
    ruleset: &Ruleset,
    removal: Removal,
) -> Result<(), RemoveError> {
    let link = host.delete(&removal.host_interface, removal.host_mac).await;
    let outcome = match link {
        Ok(()) => vec![ruleset.edit(Edit::Remove(removal)).await],
        // It may still speak, so the rules stay.
        failed => vec![failed],
    };
    let errors: Vec<_> = outcome.into_iter().filter_map(Result::err).collect();
    if errors.is_empty() {
        Ok(())
    } else {
        Err(RemoveError(errors))
    }
}

/// What the rules must know of the pod.
pub(crate) fn rules(plan: &PodPlan, applied: &Applied) -> PodRules {
    PodRules {
        interface: applied.host_interface.clone(),
        mac: applied.pod_mac,
        addresses: plan.addresses.clone(),
        table: plan.table,
        policy: plan.policy.clone(),
    }
}

/// What of a build has to be undone, in the order it was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Done {
    /// With all that hangs on it: addresses, routes, neighbours.
    Link,
    Rules,
    Capture,
}

struct Build<'a> {
    host: &'a Host,
    ruleset: &'a Ruleset,
    plan: &'a PodPlan,
    netns: Netns,
    applied: Applied,
    done: Vec<Done>,
}

impl Build<'_> {
    /// Denial and capture stand before either end is up.
    async fn run(&mut self) -> Result<(), Error> {
        self.create_link().await?;
        self.done.push(Done::Link);
        let (rules, inside) = tokio::join!(self.write_rules(), self.prepare_inside());
        // Both ended; whichever succeeded is to be undone if the other did not.
        self.done.extend(rules.is_ok().then_some(Done::Rules));
        let captured = self.plan.capture.is_some() && inside.is_ok();
        self.done.extend(captured.then_some(Done::Capture));
        rules?;
        let inside = inside?;
        self.connect_host().await?;
        self.connect_pod(inside).await
    }

    /// In reverse, with one exception: the link goes before the rules that watch it.
    async fn undo(self) -> Vec<Error> {
        let mut errors = Vec::new();
        if self.done.contains(&Done::Capture) {
            errors.extend(capture::undo(&self.netns).await.err());
        }
        if self.done.contains(&Done::Link) {
            // Rules that were not written are not missed by their removal.
            let removal = Removal::from(&self.applied);
            let failed = remove(self.host, self.ruleset, removal).await.err();
            errors.extend(failed.into_iter().flat_map(|RemoveError(errors)| errors));
        }
        errors
    }

    async fn create_link(&self) -> Result<(), Error> {
        let (netns, applied) = (self.netns.clone(), self.applied.clone());
        let work = move |rtnl: &mut Rtnl| {
            let Applied {
                host_interface,
                host_mac,
                pod_mac,
                ifname,
                mtu,
                ..
            } = &applied;
            let host = End {
                name: host_interface,
                mac: *host_mac,
            };
            let pod = End {
                name: ifname,
                mac: *pod_mac,
            };
            let pair = links::veth(&host, &pod, netns.descriptor(), *mtu);
            let step = format!("creating the pair {host_interface} and {ifname}");
            let created = rtnl.run(vec![Request::new(step, CREATE, pair)]);
            created.map_err(|error| explain_existing(rtnl, host_interface, error))
        };
        self.host.run(work).await
    }

    async fn write_rules(&self) -> Result<(), Error> {
        let rules = rules(self.plan, &self.applied);
        let container_id = self.plan.container_id.clone();
        self.ruleset
            .edit(Edit::Pod {
                container_id,
                rules,
            })
            .await
    }

    /// Settings and capture in the pod, and a socket there for later.
    async fn prepare_inside(&self) -> Result<(Rtnl, u32), Error> {
        let (ifname, sysctls) = (self.plan.ifname.clone(), self.host.sysctls.clone());
        let has_ipv6 = self.plan.addresses.iter().any(|address| address.is_ipv6());
        let text = self.plan.capture.as_ref();
        let text = text.map(|it| capture::render(it, &self.plan.addresses, &self.plan.node));
        let work = move || {
            quieten(&sysctls, &ifname, has_ipv6)?;
            let inside = (Rtnl::open()?, index_of(&ifname)?);
            // Last, for what fails before it leaves nothing in the pod but a link that will go.
            if let Some(text) = text {
                nft::transact("capture in the pod", &text)?;
            }
            Ok(inside)
        };
        self.netns.run(work).await
    }

    async fn connect_host(&self) -> Result<(), Error> {
        let (applied, node) = (self.applied.clone(), self.plan.node.clone());
        let sysctls = self.host.sysctls.clone();
        let has_ipv6 = applied.addresses.iter().any(|address| address.is_ipv6());
        let work = move |rtnl: &mut Rtnl| {
            quieten(&sysctls, &applied.host_interface, has_ipv6)?;
            let index = index_of(&applied.host_interface)?;
            let note = links::alias(index, &note(&applied.container_id));
            let mut requests = vec![
                Request::new("noting the container on the link", 0, note),
                Request::new("bringing the host's end up", 0, links::up(index)),
            ];
            for &address in &applied.addresses {
                let neighbour = links::permanent_neighbour(index, address, applied.pod_mac);
                let step = format!("noting the pod's MAC for {address}");
                requests.push(Request::new(step, REPLACE, neighbour));
                let route = host_route(address, index, &node).build();
                requests.push(Request::new(
                    format!("routing {address} to the pod"),
                    CREATE,
                    route,
                ));
            }
            rtnl.run(requests)
        };
        self.host.run(work).await
    }

    /// The last step: with the pod's end up, packets flow.
    async fn connect_pod(&self, (mut rtnl, index): (Rtnl, u32)) -> Result<(), Error> {
        let applied = self.applied.clone();
        let work = move || {
            let mut requests = Vec::new();
            for &address in &applied.addresses {
                let step = format!("giving the pod {address}");
                requests.push(Request::new(
                    step,
                    CREATE,
                    links::address(index, address, false),
                ));
            }
            requests.push(Request::new(
                "bringing the pod's end up",
                0,
                links::up(index),
            ));
            for &address in &applied.addresses {
                let gateway = links::gateway(address.is_ipv6());
                let neighbour = links::permanent_neighbour(index, gateway, applied.host_mac);
                let step = format!("noting the host's MAC for {gateway}");
                requests.push(Request::new(step, REPLACE, neighbour));
                for route in pod_routes(address.is_ipv6(), index) {
                    let step = format!("routing the pod by {gateway}");
                    requests.push(Request::new(step, CREATE, route.build()));
                }
            }
            rtnl.run(requests)?;
            // Runtimes do this too, but not all of them before the first container starts; the
            // sidecar is reached by it.
            rtnl.run(vec![Request::new(
                "bringing lo up in the pod",
                0,
                links::up(LOOPBACK),
            )])
        };
        let task = tokio::task::spawn_blocking(work);
        task.await.map_err(|_| Error::Closed)?
    }
}

/// The first link of every network namespace.
const LOOPBACK: u32 = 1;

/// How a link says whose it is.
pub(crate) fn note(container_id: &str) -> String {
    format!("turnpike:{container_id}")
}

pub(crate) fn container_in(note: &str) -> Option<&str> {
    note.strip_prefix("turnpike:")
}

pub(crate) fn host_route(address: IpAddr, index: u32, node: &[IpAddr]) -> Route {
    let source = node
        .iter()
        .copied()
        .find(|node| node.is_ipv4() == address.is_ipv4());
    Route {
        source,
        ..Route::link(address, index, marks::PODS_TABLE)
    }
}

pub(crate) fn pod_routes(v6: bool, index: u32) -> [Route; 2] {
    let gateway = links::gateway(v6);
    [
        Route::link(gateway, index, MAIN),
        Route::default(gateway, index, MAIN),
    ]
}

/// Keeps the kernel from talking IPv6 on a link by itself: nobody is there to answer, and a pod that
/// speaks with an address it was not given counts as spoofing.
fn quieten(sysctls: &Sysctls, interface: &str, has_ipv6: bool) -> Result<(), Error> {
    let setting = if has_ipv6 {
        "addr_gen_mode"
    } else {
        "disable_ipv6"
    };
    sysctls.set_ipv6(&format!("ipv6/conf/{interface}/{setting}"), "1")
}

fn index_of(interface: &str) -> Result<u32, Error> {
    if_nametoindex(interface)
        .map_err(|errno| Error::kernel(format!("looking up {interface}"))(errno.into()))
}

/// "File exists" may mean either end.
fn explain_existing(rtnl: &mut Rtnl, host_interface: &str, error: Error) -> Error {
    let exists = matches!(&error, Error::Kernel { source, .. }
        if source.raw_os_error() == Some(libc::EEXIST));
    match Link::find(rtnl, host_interface) {
        Ok(Some(link)) if exists => Error::Occupied {
            interface: link.name,
            container_id: link
                .alias
                .as_deref()
                .and_then(container_in)
                .map(str::to_owned),
        },
        _ => error,
    }
}
