//! What is refused before the agent hears of it.

use serde_json::{Value, json};

use crate::world::{Variables, World, execute, variables};

type Spoil = fn(&mut Variables, &mut Value);

/// What is wrong with the input, and the code it must be refused with.
const MALFORMED: &[(&str, u32, Spoil)] = &[
    ("no command", 4, |v, _| drop(v.remove("CNI_COMMAND"))),
    ("unknown command", 4, |v, _| {
        drop(v.insert("CNI_COMMAND", "add".into()))
    }),
    ("no container", 4, |v, _| drop(v.remove("CNI_CONTAINERID"))),
    ("empty container", 4, |v, _| {
        drop(v.insert("CNI_CONTAINERID", String::new()))
    }),
    ("container as path", 4, |v, _| {
        drop(v.insert("CNI_CONTAINERID", "../../etc".into()))
    }),
    ("container too long", 4, |v, _| {
        drop(v.insert("CNI_CONTAINERID", "c".repeat(201)))
    }),
    ("no interface", 4, |v, _| drop(v.remove("CNI_IFNAME"))),
    ("interface as path", 4, |v, _| {
        drop(v.insert("CNI_IFNAME", "a/b".into()))
    }),
    ("interface with space", 4, |v, _| {
        drop(v.insert("CNI_IFNAME", "eth 0".into()))
    }),
    ("interface too long", 4, |v, _| {
        drop(v.insert("CNI_IFNAME", "sixteencharacter".into()))
    }),
    ("no netns", 4, |v, _| drop(v.remove("CNI_NETNS"))),
    ("missing netns", 3, |v, _| {
        drop(v.insert("CNI_NETNS", "/run/netns/tpt-none".into()))
    }),
    ("no arguments", 4, |v, _| drop(v.remove("CNI_ARGS"))),
    ("no pod name", 4, |v, _| {
        drop(v.insert("CNI_ARGS", "K8S_POD_NAMESPACE=shop".into()))
    }),
    ("malformed arguments", 4, |v, _| {
        drop(v.insert("CNI_ARGS", "K8S_POD_NAME".into()))
    }),
    ("not an object", 7, |_, c| *c = json!([1])),
    ("no version", 1, |_, c| c["cniVersion"] = "".into()),
    ("old version", 1, |_, c| c["cniVersion"] = "0.3.1".into()),
    ("future version", 1, |_, c| c["cniVersion"] = "2.0.0".into()),
    ("version not text", 7, |_, c| c["cniVersion"] = 1.into()),
    ("no name", 7, |_, c| c["name"] = "".into()),
    ("strange name", 7, |_, c| c["name"] = "a b".into()),
    ("relative socket", 7, |_, c| {
        c["agentSocket"] = "cni.sock".into()
    }),
    ("socket not text", 7, |_, c| c["agentSocket"] = 3.into()),
    ("no time", 7, |_, c| c["timeoutSeconds"] = 0.into()),
    ("endless time", 7, |_, c| c["timeoutSeconds"] = 601.into()),
    ("negative time", 7, |_, c| c["timeoutSeconds"] = (-1).into()),
    ("unknown field", 2, |_, c| c["ipMasq"] = true.into()),
    ("other's addresses", 2, |_, c| {
        c["ipam"] = json!({"type": "host-local"})
    }),
];

#[test]
fn malformed_input_is_refused_before_the_agent_hears_of_it() {
    let world = World::new();
    for (what, code, spoil) in MALFORMED {
        let (mut environment, mut config) = (variables("ADD"), world.config("1.1.0"));
        spoil(&mut environment, &mut config);
        let (success, error) = execute(&environment, &config.to_string());
        assert!(!success, "{what}");
        assert_eq!(error["code"], *code, "{what}: {error}");
        assert_eq!(error["cniVersion"], "1.1.0", "{what}");
        assert!(
            error["msg"].as_str().is_some_and(|text| !text.is_empty()),
            "{what}: {error}"
        );
    }
    let endless = format!("{{\"x\": \"{}\"}}", "x".repeat(1 << 20));
    for (what, stdin) in [
        ("nothing", ""),
        ("half", "{\"cniVersion\":"),
        ("too long", &endless),
    ] {
        let (success, error) = execute(&variables("ADD"), stdin);
        assert!(!success, "{what}");
        assert_eq!(error["code"], 6, "{what}: {error}");
    }
    assert_eq!(world.asked(), Vec::<String>::new());
    assert_eq!(
        std::fs::read_dir(world.folder.path()).unwrap().count(),
        1,
        "a side effect"
    );
}

#[test]
fn gc_is_told_what_lives_or_does_nothing() {
    let world = World::new();
    let gc = |valid: Option<Value>| {
        let mut config = world.config("1.1.0");
        if let Some(valid) = valid {
            config["cni.dev/valid-attachments"] = valid;
        }
        let environment = Variables::from([("CNI_COMMAND", "GC".to_owned())]);
        execute(&environment, &config.to_string())
    };
    // As libcni writes a list of nothing.
    for nothing in [Value::Null, json!([])] {
        assert_eq!(gc(Some(nothing)), (true, Value::Null));
        assert_eq!(world.asked(), ["GC "]);
    }
    let (success, error) = gc(None);
    assert!(!success);
    assert_eq!(error["code"], 7, "{error}");
    assert_eq!(
        world.asked(),
        Vec::<String>::new(),
        "every pod would be removed"
    );
    for strange in [json!("all"), json!([{"containerID": "a"}]), json!([null])] {
        let (success, error) = gc(Some(strange));
        assert!(!success);
        assert_eq!(error["code"], 7, "{error}");
    }
    assert_eq!(world.asked(), Vec::<String>::new());
}

#[test]
fn check_compares_the_address_with_what_add_answered() {
    let world = World::new();
    let check = |config: &Value| execute(&variables("CHECK"), &config.to_string());
    let good = world.config_after_add();
    assert_eq!(check(&good), (true, Value::Null));
    assert_eq!(world.asked(), ["CHECK c0ffee"]);

    // Of a chain: others' interfaces and addresses are theirs to check.
    let mut chained = good.clone();
    let others = [
        json!({"address": "10.9.9.9/24", "interface": 0}),
        json!({"address": "fd00::5/128", "interface": 1}),
    ];
    let ips = chained["prevResult"]["ips"].as_array_mut().unwrap();
    ips.extend(others);
    assert_eq!(check(&chained), (true, Value::Null));

    type Spoil = fn(&mut Value);
    let spoils: [(&str, u32, Spoil); 7] = [
        ("another address", 101, |p| {
            p["ips"][0]["address"] = "10.0.1.6/32".into()
        }),
        ("the host's end", 101, |p| {
            p["ips"][0]["interface"] = 0.into()
        }),
        ("no address", 101, |p| p["ips"] = json!([])),
        ("no such interface", 7, |p| {
            p["ips"][0]["interface"] = 2.into()
        }),
        ("malformed address", 7, |p| {
            p["ips"][0]["address"] = "here".into()
        }),
        ("malformed list", 7, |p| p["ips"] = "none".into()),
        ("no result", 7, |p| *p = Value::Null),
    ];
    for (what, code, spoil) in spoils {
        let mut config = good.clone();
        spoil(&mut config["prevResult"]);
        let (success, error) = check(&config);
        assert!(!success, "{what}");
        assert_eq!(error["code"], code, "{what}: {error}");
        assert_eq!(error["cniVersion"], "1.1.0", "{what}");
    }
}
