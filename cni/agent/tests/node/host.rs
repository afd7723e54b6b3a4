//! What the agent has of its machine: folders of the runtime's, and capabilities.

use std::{fs, os::unix::fs::MetadataExt, path::Path};

use nix::sys::signal::Signal;

use super::{
    CALM,
    rig::{self, Rig, wait_for},
    system_pod,
};

#[test]
fn the_runtime_finds_executable_and_configuration_once_adds_can_be_served() {
    let host = tempfile::tempdir().unwrap();
    let [bin, conf] = ["bin", "net.d"].map(|name| host.path().join(name));
    for folder in [&bin, &conf] {
        fs::create_dir(folder).unwrap();
    }
    let mut rig = Rig::up(
        "ag8",
        CALM,
        &[
            ("TURNPIKE_CNI_BIN_DIR", bin.to_str().unwrap()),
            ("TURNPIKE_CNI_CONF_DIR", conf.to_str().unwrap()),
        ],
    );
    // `up` waited for readiness.
    let plugin = bin.join("turnpike-cni");
    let ours = Path::new(env!("CARGO_BIN_EXE_turnpike-node")).with_file_name("turnpike-cni");
    assert!(fs::read(&plugin).unwrap() == fs::read(ours).unwrap());
    assert_eq!(fs::metadata(&plugin).unwrap().mode() & 0o777, 0o755);
    let conflist = conf.join("10-turnpike.conflist");
    let text = fs::read_to_string(&conflist).unwrap();
    assert!(
        text.contains(rig.path("cni.sock").to_str().unwrap()),
        "{text}"
    );

    fs::remove_file(&conflist).unwrap();
    wait_for("the configuration comes back", || conflist.exists());
    let rival = conf.join("10-aws.conflist");
    fs::write(&rival, "{}").unwrap();
    wait_for("the agent says who is in its way", || {
        let answer = rig.get(61678, "/healthz/ready");
        answer.starts_with("HTTP/1.1 503") && answer.contains("10-aws.conflist comes before")
    });
    fs::remove_file(&rival).unwrap();
    wait_for("the agent is ready again", || {
        rig.get(61678, "/healthz/ready").starts_with("HTTP/1.1 200")
    });
    assert!(rig.get(61678, "/healthz/live").starts_with("HTTP/1.1 200"));

    assert!(rig.end(Signal::SIGTERM).success());
    assert!(
        plugin.exists() && conflist.exists(),
        "pods keep their network"
    );
}

#[test]
fn each_capability_that_its_container_has_is_needed() {
    let mut rig = Rig::up("ag9", CALM, &[("WARM_IP_TARGET", "4")]);
    rig.end(Signal::SIGTERM);
    for missing in rig::capabilities() {
        rig.capabilities = rig::capabilities();
        rig.capabilities.retain(|name| *name != missing);
        rig.launch();
        let mut ended = false;
        wait_for("the agent ends, or is ready", || {
            ended = rig.has_ended();
            ended || rig.get(61678, "/healthz/ready").starts_with("HTTP/1.1 200")
        });
        if !ended {
            let pod = system_pod(&rig, "a", "dns-a");
            let said = rig.add(&pod);
            assert!(!said.ok, "a pod was started without {missing}");
            assert!(
                said.json.to_string().contains("not permitted"),
                "{}",
                said.json
            );
            rig.del(&pod);
            rig.end(Signal::SIGTERM);
        }
    }
    rig.capabilities = rig::capabilities();
    rig.start();
}
