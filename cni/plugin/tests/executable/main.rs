//! The real executable, as a runtime runs it, against an agent on a Unix socket.

#![allow(clippy::unwrap_used, reason = "a test ends at what it cannot do")]

mod input;
mod world;

use std::{collections::BTreeMap, fs, path::Path, time::Duration};

use serde_json::{Value, json};
use tonic::Status;

use world::{World, execute, run, variables};

#[test]
fn add_answers_in_the_form_of_each_version() {
    let world = World::new();
    let interfaces = |mtu: bool| {
        let mut list = json!([
            {"name": "eni18582a65b10", "mac": "02:00:00:00:00:01"},
            {"name": "eth0", "mac": "02:00:00:00:00:02", "sandbox": "/proc/self/ns/net"},
        ]);
        if mtu {
            list[0]["mtu"] = 9001.into();
            list[1]["mtu"] = 9001.into();
        }
        list
    };
    for version in ["0.4.0", "1.0.0", "1.1.0"] {
        let (success, result) = execute(&variables("ADD"), &world.config(version).to_string());
        assert!(success, "{result}");
        let mut ip = json!({"address": "10.0.1.5/32", "gateway": "169.254.1.1", "interface": 1});
        if version == "0.4.0" {
            ip["version"] = "4".into();
        }
        let expected = json!({
            "cniVersion": version,
            "interfaces": interfaces(version == "1.1.0"),
            "ips": [ip],
            "routes": [{"dst": "0.0.0.0/0", "gw": "169.254.1.1"}],
            "dns": {},
        });
        assert_eq!(result, expected);
        assert_eq!(world.asked(), ["ADD c0ffee eth0 turnpike shop cart-0 u-1"]);
    }
}

#[test]
fn what_an_earlier_plugin_made_is_kept() {
    let world = World::new();
    let mut config = world.config("1.0.0");
    config["prevResult"] = json!({
        "cniVersion": "1.0.0", "interfaces": [{"name": "other0"}], "dns": {"nameservers": ["10.0.0.2"]},
    });
    let (success, result) = execute(&variables("ADD"), &config.to_string());
    assert!(success, "{result}");
    assert_eq!(result["interfaces"].as_array().unwrap().len(), 3);
    assert_eq!(result["interfaces"][0]["name"], "other0");
    assert_eq!(result["ips"][0]["interface"], 2);
    assert_eq!(result["dns"]["nameservers"][0], "10.0.0.2");

    config["prevResult"] = json!({"interfaces": "none"});
    let (success, result) = execute(&variables("ADD"), &config.to_string());
    assert!(!success);
    assert_eq!(result["code"], 7);
}

#[test]
fn the_other_commands_print_nothing() {
    let world = World::new();
    for (command, asked) in [
        ("DEL", "DEL c0ffee eth0 turnpike shop cart-0"),
        ("STATUS", "STATUS"),
    ] {
        assert_eq!(run(&world, command), (true, Value::Null), "{command}");
        assert_eq!(world.asked(), [asked]);
    }
    let mut config = world.config("1.1.0");
    config["cni.dev/valid-attachments"] =
        json!([{"containerID": "a", "ifname": "eth0"}, {"containerID": "b", "ifname": "eth0"}]);
    let environment = BTreeMap::from([("CNI_COMMAND", "GC".to_owned())]);
    assert_eq!(
        execute(&environment, &config.to_string()),
        (true, Value::Null)
    );
    assert_eq!(world.asked(), ["GC a/eth0 b/eth0"]);
}

#[test]
fn version_needs_neither_agent_nor_configuration() {
    let environment = BTreeMap::from([("CNI_COMMAND", "VERSION".to_owned())]);
    let all = json!(["0.4.0", "1.0.0", "1.1.0"]);
    for (stdin, version) in [
        ("", "1.1.0"),
        ("{}", "1.1.0"),
        (r#"{"cniVersion":"0.4.0"}"#, "0.4.0"),
    ] {
        let (success, result) = execute(&environment, stdin);
        assert!(success);
        assert_eq!(
            result,
            json!({"cniVersion": version, "supportedVersions": all})
        );
    }
}

#[test]
fn status_and_gc_are_of_the_newest_version_alone() {
    let world = World::new();
    for command in ["STATUS", "GC"] {
        let (success, error) = execute(&variables(command), &world.config("1.0.0").to_string());
        assert!(!success);
        assert_eq!(
            (&error["code"], &error["cniVersion"]),
            (&json!(1), &json!("1.0.0"))
        );
    }
    assert_eq!(world.asked(), Vec::<String>::new());
}

#[test]
fn del_takes_what_is_left_of_its_input() {
    let world = World::new();
    let mut environment = variables("DEL");
    environment.remove("CNI_NETNS");
    environment.insert("CNI_ARGS", "broken".into());
    let mut config = world.config("1.1.0");
    config["leftover"] = "of an older configuration".into();
    assert_eq!(
        execute(&environment, &config.to_string()),
        (true, Value::Null)
    );
    assert_eq!(world.asked(), ["DEL c0ffee eth0 turnpike  "]);
}

#[test]
fn refusals_of_the_agent_have_the_specifications_codes() {
    let world = World::new();
    for (status, add, asked_status) in [
        (Status::invalid_argument("no"), 7, 7),
        (Status::not_found("no"), 3, 3),
        (Status::resource_exhausted("no"), 11, 50),
        (Status::unavailable("no"), 11, 50),
        (Status::failed_precondition("no"), 11, 51),
        (Status::internal("no"), 100, 100),
    ] {
        world.refuse(status.clone());
        for (command, code) in [("ADD", add), ("STATUS", asked_status)] {
            let (success, error) = run(&world, command);
            assert!(!success, "{status}");
            assert_eq!(error["code"], code, "{command} {status}");
            assert!(error["msg"].as_str().unwrap().ends_with(": no"), "{error}");
        }
    }
}

fn tombstones(folder: &Path) -> Vec<(String, Value)> {
    let Ok(entries) = fs::read_dir(folder.join("removed")) else {
        return Vec::new();
    };
    let read = entries.map(|entry| {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        (
            name,
            serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap(),
        )
    });
    read.collect()
}

#[test]
fn without_an_agent_del_is_noted_and_the_others_are_told_to_try_again() {
    let world = World::without_agent();
    let mut config = world.config_after_add();
    config["cni.dev/valid-attachments"] = json!([]);
    for (command, code) in [("ADD", 11), ("CHECK", 11), ("GC", 11), ("STATUS", 50)] {
        let (success, error) = execute(&variables(command), &config.to_string());
        assert!(!success, "{command}");
        assert_eq!(error["code"], code, "{command}: {error}");
    }
    assert!(tombstones(world.folder.path()).is_empty());

    for _ in 0..2 {
        assert_eq!(run(&world, "DEL"), (true, Value::Null));
    }
    let noted = tombstones(world.folder.path());
    assert_eq!(noted.len(), 1);
    let (name, mut content) = noted.into_iter().next().unwrap();
    assert_eq!(name, "c0ffee@eth0.json");
    assert!(content["time_ms"].take().as_u64().unwrap() > 0);
    let expected = json!({
        "container_id": "c0ffee", "ifname": "eth0", "network": "turnpike",
        "netns": "/proc/self/ns/net", "pod_namespace": "shop", "pod_name": "cart-0", "time_ms": null,
    });
    assert_eq!(content, expected);
}

/// After a boot the agent's folder is not there yet, and the gate's user must pass through it later.
#[test]
fn a_del_before_the_agents_first_start_leaves_its_folder_open() {
    use std::os::unix::fs::PermissionsExt as _;
    let world = World::without_agent();
    let folder = world.folder.path().join("turnpike");
    let mut config = world.config("1.1.0");
    config["agentSocket"] = json!(folder.join("cni.sock"));
    let deleted = execute(&variables("DEL"), &config.to_string());
    assert_eq!(deleted, (true, Value::Null));
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&folder), 0o755);
    assert_eq!(mode(&folder.join("removed")), 0o700, "root's alone");
}

#[test]
fn an_agent_that_hangs_is_given_up_at_the_deadline() {
    let world = World::new();
    *world.agent.delay.lock().unwrap() = Duration::from_secs(3600);
    let mut config = world.config("1.1.0");
    config["timeoutSeconds"] = 1.into();
    let (success, error) = execute(&variables("ADD"), &config.to_string());
    assert!(!success);
    assert_eq!(error["code"], 11, "{error}");
    assert_eq!(
        execute(&variables("DEL"), &config.to_string()),
        (true, Value::Null)
    );
    assert_eq!(tombstones(world.folder.path()).len(), 1);
}

#[test]
fn a_del_that_can_be_neither_done_nor_noted_fails() {
    let world = World::without_agent();
    fs::write(world.folder.path().join("removed"), "in the way").unwrap();
    let (success, error) = run(&world, "DEL");
    assert!(!success);
    assert_eq!(error["code"], 5, "{error}");
}
