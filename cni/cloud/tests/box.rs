//! The real SDK against the EC2 API and metadata service of a VPC in a box.
//!
//! The outer test runs the box and starts this file's inner test inside a node's namespace, with
//! nothing but the SDK's own settings to say where EC2 is. Needs root.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use tokio::sync::Notify;
use turnpike_cloud::{
    AttachmentState, Cloud, CloudError, Ec2, Interface, NewInterface, Pace, Wanted,
};
use turnpike_vpc::{
    netns::{Command, Namespace, Output},
    run::{Options, down, run},
    spec::{DEFAULT, Spec},
};

const NAME: &str = "tpt-cloud";
const FAULTS: &str = r"
faults:
  seed: 7
  latency: {minMs: 0, maxMs: 20}
  transition: {minMs: 50, maxMs: 400}
  describeLag: {minMs: 0, maxMs: 300}
  failures: 0.05
  throttle: {describeBurst: 6, describePerSecond: 10.0, mutateBurst: 3, mutatePerSecond: 4.0}
";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_sdk_and_the_box_understand_each_other() {
    assert!(
        nix::unistd::geteuid().is_root(),
        "this test makes network namespaces: run it as root"
    );
    down(NAME.to_owned()).await.unwrap();
    let state = tempfile::tempdir().unwrap();
    let spec = Spec::parse(&format!("{DEFAULT}\n{FAULTS}")).unwrap();
    let options = Options {
        name: NAME.into(),
        spec,
        state: state.path().into(),
    };
    let stop = Arc::new(Notify::new());
    let stopped = Arc::clone(&stop);
    let the_box = tokio::spawn(async move { run(options, stopped.notified()).await });
    let ready = state.path().join("ready");
    while !ready.exists() {
        assert!(!the_box.is_finished(), "the box ended: {:?}", the_box.await);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let output = tokio::task::spawn_blocking(|| {
        let node = Namespace::open(&format!("{NAME}-node-a")).unwrap();
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "inside_the_box", "--ignored", "--nocapture"])
            .env("AWS_ENDPOINT_URL_EC2", "http://10.0.0.2:8773")
            .env("AWS_REGION", "eu-west-1")
            .stdout(Output::Piped)
            .stderr(Output::Piped)
            .output(&node)
            .unwrap()
    })
    .await
    .unwrap();
    stop.notify_one();
    the_box.await.unwrap().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}\n{error}"
    );
}

async fn one(cloud: &Ec2, id: &str) -> Interface {
    let found = cloud
        .interfaces(&[("network-interface-id", id)])
        .await
        .unwrap();
    found.into_iter().next().expect("the interface is listed")
}

async fn wait(cloud: &Ec2, id: &str, done: impl Fn(&Interface) -> bool) -> Interface {
    loop {
        let found = cloud
            .interfaces(&[("network-interface-id", id)])
            .await
            .unwrap();
        if let Some(interface) = found.into_iter().find(&done) {
            return interface;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Repeats what the box failed on purpose where the client must not repeat it by itself.
async fn surely<T, F: Future<Output = Result<T, CloudError>>>(call: impl Fn() -> F) -> T {
    loop {
        match call().await {
            Err(error) if error.is_unknown() => {} // an InternalError of the box changes nothing
            answer => return answer.unwrap(),
        }
    }
}

#[tokio::test]
#[ignore = "runs in a node of the box, started by the test above"]
async fn inside_the_box() {
    let cloud = Ec2::connect(Pace {
        describe: (50, 50.0),
        change: (50, 50.0),
    })
    .await;
    let instance = cloud.instance().await.unwrap();
    assert_eq!(instance.instance_type, "m5.large");
    assert_eq!(instance.subnet_cidr, "10.0.0.0/18".parse().unwrap());
    assert_eq!(instance.vpc_cidrs, ["10.0.0.0/16".parse().unwrap()]);
    let limits = cloud.limits(&instance.instance_type).await.unwrap();
    assert_eq!((limits.interfaces, limits.addresses_per_interface), (3, 10));
    let subnets = cloud
        .subnets(std::slice::from_ref(&instance.subnet))
        .await
        .unwrap();
    assert_eq!(subnets[0].cidr, instance.subnet_cidr);

    let primary = one(&cloud, &instance.interface).await;
    assert_eq!(
        (primary.primary, primary.mac),
        (instance.address, instance.mac.clone())
    );
    let gained = surely(|| cloud.assign(&instance.interface, &Wanted::Count(4))).await;
    assert_eq!(gained.len(), 4);
    let listed = wait(&cloud, &instance.interface, |it| it.secondary.len() == 4).await;
    assert!(
        gained
            .iter()
            .all(|address| listed.secondary.contains(address))
    );
    let over = loop {
        match cloud.assign(&instance.interface, &Wanted::Count(9)).await {
            Err(error) if error.is_unknown() => {}
            answer => break answer.unwrap_err(),
        }
    };
    assert!(matches!(over, CloudError::AddressLimit { .. }), "{over}");
    surely(|| cloud.unassign(&instance.interface, &gained[..1])).await;
    let back = Wanted::Exactly(vec![gained[0]]);
    surely(|| cloud.assign(&instance.interface, &back)).await;

    an_interface_from_birth_to_death(&cloud, &instance, &primary.groups).await;

    let missing = cloud.delete("eni-0123456789abcdef0").await.unwrap_err();
    assert!(matches!(missing, CloudError::NotFound { .. }), "{missing}");
}

async fn an_interface_from_birth_to_death(
    cloud: &Ec2,
    instance: &turnpike_cloud::Instance,
    groups: &[String],
) {
    let tags = BTreeMap::from([(
        "node.k8s.amazonaws.com/instance_id".into(),
        instance.id.clone(),
    )]);
    let wanted = NewInterface {
        subnet: instance.subnet.clone(),
        groups: groups.to_vec(),
        addresses: 3,
        description: format!("aws-K8S-{}", instance.id),
        tags,
        token: "once-and-only-once".into(),
    };
    let made = cloud.create(&wanted).await.unwrap();
    let again = cloud.create(&wanted).await.unwrap();
    assert_eq!(made.id, again.id, "one token makes one interface");
    assert_eq!(made.secondary.len(), 3);
    let tag = "tag:node.k8s.amazonaws.com/instance_id";
    wait(cloud, &made.id, |it| it.available).await;
    // A look may show an older world than the one before it.
    let by_tag = loop {
        let found = cloud.interfaces(&[(tag, &instance.id)]).await.unwrap();
        if !found.is_empty() {
            break found;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    assert_eq!(by_tag.len(), 1);

    let attachment = surely(|| cloud.attach(&made.id, &instance.id, 1)).await;
    let is_attached = |it: &Interface| {
        it.attachment
            .as_ref()
            .is_some_and(|it| it.state == AttachmentState::Attached)
    };
    let attached = wait(cloud, &made.id, is_attached).await;
    let in_use = loop {
        match cloud.delete(&made.id).await {
            Err(error) if error.is_unknown() => {}
            answer => break answer.unwrap_err(),
        }
    };
    assert!(matches!(in_use, CloudError::NotNow { .. }), "{in_use}");
    assert_eq!(attached.attachment.unwrap().device_index, 1);
    cloud
        .delete_on_termination(&made.id, &attachment)
        .await
        .unwrap();
    wait(cloud, &made.id, |it| {
        it.attachment
            .as_ref()
            .is_some_and(|it| it.delete_on_termination)
    })
    .await;
    surely(|| cloud.detach(&attachment)).await;
    wait(cloud, &made.id, |it| it.attachment.is_none()).await;
    // The box lists it as detached a moment before or after it is.
    loop {
        match cloud.delete(&made.id).await {
            Ok(()) | Err(CloudError::NotFound { .. }) => break,
            Err(CloudError::NotNow { .. } | CloudError::Unknown { .. }) => {}
            Err(error) => panic!("{error}"),
        }
    }
}
