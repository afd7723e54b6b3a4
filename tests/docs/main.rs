//! What the documentation tells a user to write and to type does what it says there.
//!
//! The policy of the project's README is put into a world, and the `sh` blocks of the command's
//! README are typed into it, in order. What they say must have the lines of the `text` block that
//! follows, whatever the numbers in it; `…` stands for anything.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{path::Path, process::Command, time::Duration};

use serde_json::Value;
use turnpike_rig::{Options, World, cluster, wait_for, world::program};

const SOON: Duration = Duration::from_secs(10);
const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

/// A fenced block of a page: its language, and what is in it.
type Block = (String, String);

fn blocks(page: &str) -> Vec<Block> {
    let path = Path::new(ROOT).join(page);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{page}: {error}"));
    let fenced = text.split("\n```").skip(1).step_by(2);
    let found: Vec<Block> = fenced
        .map(|block| block.split_once('\n').expect("a fence has an end"))
        .map(|(language, text)| (language.to_owned(), format!("{text}\n")))
        .collect();
    assert!(!found.is_empty(), "{page} has no fenced block");
    found
}

/// A world with the pod that the first policy selects, under what the README writes.
fn world() -> World {
    let mut world = World::up(Options::test("docs"), &|_| ()).unwrap();
    world.furnish().unwrap();
    let manifests: Vec<String> = blocks("README.md")
        .into_iter()
        .filter_map(|(language, text)| (language == "yaml").then_some(text))
        .collect();
    let [namespace, policy, strict] = &manifests[..] else {
        panic!("the README has a namespace and two policies, and not {manifests:#?}");
    };
    // In place of the cluster's own, since one object has one file.
    let cluster = world.directory.read("shop").unwrap();
    let others = cluster.split("---\n");
    let others = others.filter(|text| !text.contains("{name: shop, "));
    let cluster: Vec<&str> = others.chain([namespace.as_str()]).collect();
    world
        .directory
        .write("shop", &cluster.join("---\n"))
        .unwrap();
    world.directory.write("egress", policy).unwrap();
    world.directory.write("strict", strict).unwrap();

    let labelled = namespace.contains("turnpike.dev/inject: enabled");
    let payer = cluster::client("shop", "payer", "payment-processor", "node-b");
    let pod = world.start_pod(&payer, labelled).unwrap();
    assert!(pod.sidecar.is_some(), "its pods get a sidecar");
    let caller = cluster::client("legacy", "caller", "caller", "node-b");
    world.start_pod(&caller, false).unwrap();
    world
}

/// The HTTP status that curl gets in the pod, `000` for none.
fn status(world: &World, arguments: &str) -> String {
    let line = format!("curl -sk -o /dev/null -w '%{{http_code}}' --max-time 3 {arguments}");
    world
        .exec("shop", "payer", &["bash", "-c", &line])
        .map(|said| said.out)
        .unwrap_or_default()
}

#[test]
fn what_the_documentation_says_is_so() {
    let world = world();
    the_first_policy_holds(&world);
    what_is_typed_answers_as_shown(&world);
}

fn the_first_policy_holds(world: &World) {
    let ask = |path: &str| world.ask_controller(path).unwrap().body;
    let refused: Value = serde_json::from_str(&ask("/debug/rejections")).unwrap();
    assert_eq!(refused, serde_json::json!([]));
    let payments = || status(world, "https://api.payments.example/");
    let reached = wait_for(SOON, || Some(payments()).filter(|status| status == "200"));
    assert!(reached.is_some(), "the allowed name answers {}", payments());

    let told: Value = serde_json::from_str(&ask("/debug/status")).unwrap();
    let policies = told["policies"].as_array().unwrap();
    for name in [
        "EgressPolicy shop/payments",
        "PeerAuthentication shop/default",
    ] {
        let policy = policies.iter().find(|policy| policy["object"] == name);
        let accepted = &policy.expect("the policy is known")["conditions"][0];
        assert_eq!(accepted["type"], "Accepted", "{told}");
        assert_eq!(accepted["status"], true, "{told}");
    }

    let partner = "http://partner.example/v1/orders";
    assert_eq!(status(world, partner), "200");
    assert_eq!(status(world, &format!("-X POST {partner}")), "403");
    assert_eq!(status(world, "http://partner.example/admin"), "403");
    assert_eq!(status(world, "https://attacker.example/"), "000");
    assert_eq!(status(world, "https://203.0.113.66/"), "000");
    let seen = std::fs::read_to_string(&world.ready.internet_log).unwrap();
    assert!(!seen.contains("203.0.113.66"), "it reached the attacker");
    plaintext_is_refused(world);
}

/// From a namespace without sidecars.
fn plaintext_is_refused(world: &World) {
    let payer = world.pod("shop", "payer").unwrap();
    let url = format!("http://{}:8080/", payer.address);
    let line = ["curl", "-sS", "--max-time", "3", &url];
    let said = world.exec("legacy", "caller", &line).unwrap();
    assert!(!said.succeeded(), "{said:?}");
    let logged = wait_for(SOON, || {
        let mut lines = payer.access_log().into_iter();
        lines.find(|line| line["refused"] == "strict")
    });
    assert!(logged.is_some(), "{:?}", payer.access_log());
}

fn what_is_typed_answers_as_shown(world: &World) {
    let here = tempfile::tempdir().unwrap();
    let blocks = blocks("control-plane/cli/README.md");
    // Functions that the reader has defined in the same shell.
    let mut defined = String::new();
    let mut compared = 0;
    for (index, (language, typed)) in blocks.iter().enumerate() {
        if language != "sh" {
            continue;
        }
        let typed = typed.replace("tp-demo", &world.options.name);
        let Some((_, shown)) = blocks.get(index + 1).filter(|(next, _)| next == "text") else {
            defined += &typed;
            continue;
        };
        if typed.contains("sqlite3 ") && !is_installed("sqlite3") {
            eprintln!("sqlite3 is not installed; not typed:\n{typed}");
            continue;
        }
        // The record reaches its store a little after the fact.
        let mut missing = String::new();
        let so = wait_for(SOON, || {
            let said = run(here.path(), &format!("{defined}{typed}"));
            let absent = shown.lines().find(|line| !says(&said, line));
            missing = absent.map_or_else(String::new, |line| format!("{line}\nis not in\n{said}"));
            absent.is_none().then_some(())
        });
        assert!(so.is_some(), "{typed}{missing}");
        compared += 1;
    }
    assert!(
        compared > 5,
        "{compared} blocks of the page show what they say"
    );
}

fn is_installed(name: &str) -> bool {
    Command::new(name)
        .arg("-version")
        .output()
        .is_ok_and(|output| output.status.success())
}

/// Runs a block as a user's shell does, its folder aside. What it says on both outputs.
fn run(folder: &Path, typed: &str) -> String {
    let programs = program("turnpike").unwrap();
    let programs = programs.parent().unwrap().display();
    let script = typed.replace("$PWD/target/debug", &programs.to_string());
    let output = Command::new("bash")
        .args(["-c", &format!("exec 2>&1\n{script}")])
        .current_dir(folder)
        .output()
        .unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Whether one line of what was said has all the pieces of the line that is shown, in order.
fn says(said: &str, shown: &str) -> bool {
    said.lines().any(|line| {
        let line = normal(line);
        let mut rest = line.as_str();
        normal(shown).split('…').all(|piece| {
            let found = rest.split_once(piece.trim());
            found.inspect(|(_, after)| rest = after).is_some()
        })
    })
}

/// Without what differs from run to run: numbers, and the width of columns.
fn normal(line: &str) -> String {
    let mut normal = String::new();
    for letter in line.trim().chars() {
        let (letter, once) = match letter {
            '0'..='9' => ('#', true),
            letter if letter.is_whitespace() => (' ', true),
            letter => (letter, false),
        };
        if !(once && normal.ends_with(letter)) {
            normal.push(letter);
        }
    }
    normal
}
