//! A Deployment rolls over and scales under a steady load of meshed calls: no request fails, and
//! endpoints follow the EndpointSlices.

use std::{collections::BTreeSet, time::Duration};

use anyhow::Result;
use turnpike_cluster::{Cluster, workloads};

use crate::{
    load::Load,
    stage::{EFFECT, SOON, soon},
};

const NAMESPACE: &str = "rollout";

pub(crate) fn under_load(cluster: &mut Cluster) -> Result<()> {
    let kubectl = cluster.kubectl.clone();
    let mut objects = vec![workloads::namespace(NAMESPACE, true)];
    objects.extend(workloads::web(NAMESPACE, "web", 2));
    objects.extend(workloads::client(NAMESPACE, "client", "client", "node-b"));
    objects.extend(workloads::client(NAMESPACE, "counter", "client", "node-a"));
    kubectl.apply(&workloads::list(&objects))?;
    kubectl.rolled_out(NAMESPACE, "deploy/web", SOON)?;
    for pod in ["pod/client", "pod/counter"] {
        kubectl.wait(NAMESPACE, pod, "condition=Ready", SOON)?;
    }
    let load = Load::start(&kubectl, NAMESPACE, "client", "http://web/")?;
    std::thread::sleep(Duration::from_secs(1));

    let before = answering(cluster)?;
    kubectl.ok(&["-n", NAMESPACE, "rollout", "restart", "deploy/web"])?;
    kubectl.rolled_out(NAMESPACE, "deploy/web", SOON)?;
    soon(EFFECT, "only the new pods answer", || {
        Ok(answering(cluster)?.is_disjoint(&before))
    })?;
    for replicas in [10, 1] {
        kubectl.ok(&[
            "-n",
            NAMESPACE,
            "scale",
            "deploy/web",
            &format!("--replicas={replicas}"),
        ])?;
        kubectl.rolled_out(NAMESPACE, "deploy/web", Duration::from_secs(150))?;
        // Of ten not every one need be among those that 80 requests meet.
        let mut met = BTreeSet::new();
        soon(EFFECT, &format!("{replicas} answer"), || {
            let answering = answering(cluster)?;
            if replicas == 1 {
                return Ok(answering.len() == 1);
            }
            met.extend(answering);
            Ok(met.len() == replicas)
        })?;
    }
    std::thread::sleep(Duration::from_secs(2));
    load.stop_unharmed()?;
    Ok(())
}

/// The pods that answer some of 80 requests.
fn answering(cluster: &Cluster) -> Result<BTreeSet<String>> {
    let said = cluster.kubectl.exec(
        NAMESPACE,
        "counter/curl",
        &["curl", "-s", "--max-time", "20", "http://web/?[1-80]"],
    )?;
    Ok(said
        .out
        .lines()
        .filter_map(|line| line.split_once(" says").map(|(name, _)| name.to_owned()))
        .collect())
}
