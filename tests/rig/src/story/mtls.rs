//! Step 4: sidecar to sidecar is mutual TLS on the wire; plaintext passes or is refused by mode.

use std::time::Duration;

use anyhow::Result;
use serde_json::Value;

use super::{cast, curl};
use crate::{capture::Capture, claims::Evidence, wait_for, world::World};

const SECRET: &str = "x-card: 4242-4242-4242-4242";
const OPEN: &str = "x-open: seen-by-everyone";

pub(super) fn tell(world: &mut World) -> Result<Evidence> {
    let mut evidence = Evidence::default();
    cast(world)?;
    let pod = format!("http://{}:8080/", world.pod("shop", "web-1")?.address);
    let capture = Capture::start(world)?;
    let meshed = curl(
        world,
        "shop",
        "client",
        &["-H", SECRET, "http://web.shop/cards"],
    )?;
    let plain = curl(world, "legacy", "caller", &["-H", OPEN, &pod])?;
    let wire = capture.finish()?;
    evidence.claim(
        "curl → sidecar → sidecar → nginx",
        meshed.out.trim() == "200",
        &meshed.out,
    );
    evidence.claim(
        "nothing of that request was readable between the nodes",
        !wire.carried(SECRET) && !wire.carried("/cards"),
        format!("{} bytes captured at the fabric's router", wire.len()),
    );
    evidence.claim(
        "it was TLS, addressed to the Service by name",
        wire.carried("p80.web.shop.cluster.svc.turnpike"),
        "SNI p80.web.shop.cluster.svc.turnpike",
    );
    evidence.claim(
        "the capture would have shown plaintext: a caller without a sidecar is in it",
        wire.carried(OPEN),
        OPEN,
    );
    identities(world, &mut evidence)?;
    evidence.claim(
        "PERMISSIVE: a plaintext caller from an unlabelled namespace passes",
        plain.out.trim() == "200",
        &plain.out,
    );

    world
        .directory
        .write("strict", include_str!("../../cluster/strict.yaml"))?;
    let refused = wait_for(Duration::from_secs(5), || {
        let said = curl(world, "legacy", "caller", &[&pod]).ok()?;
        (said.out.trim() != "200").then_some(said)
    });
    evidence.claim(
        "STRICT: the same caller is refused",
        refused.is_some(),
        refused.map_or("it passed".into(), |said| {
            format!("curl ended with {:?}", said.code)
        }),
    );
    let still = curl(world, "shop", "client", &["http://web.shop/"])?;
    evidence.claim(
        "STRICT: the mesh is served as before",
        still.out.trim() == "200",
        &still.out,
    );
    world.directory.remove("strict")?;
    let back = wait_for(Duration::from_secs(5), || {
        let said = curl(world, "legacy", "caller", &[&pod]).ok()?;
        (said.out.trim() == "200").then_some(())
    });
    evidence.claim(
        "without STRICT it passes again",
        back.is_some(),
        "policy removed",
    );
    Ok(evidence)
}

/// Both ends know each other: the server's log names the client, the client's the server.
fn identities(world: &World, evidence: &mut Evidence) -> Result<()> {
    let client = "spiffe://cluster.local/ns/shop/sa/client";
    let server = "spiffe://cluster.local/ns/shop/sa/web";
    let (web, caller) = (world.pod("shop", "web-1")?, world.pod("shop", "client")?);
    let says = |log: &[Value], identity: &str| {
        log.iter()
            .any(|entry| entry["path"] == "/cards" && entry["peer_principal"] == identity)
    };
    let known = wait_for(Duration::from_secs(5), || {
        (says(&web.access_log(), client) && says(&caller.access_log(), server)).then_some(())
    });
    let seen = format!("{client} called {server}");
    evidence.claim(
        "each side's access log names the other's identity",
        known.is_some(),
        seen,
    );
    Ok(())
}
