//! Turnpike on a real Kubernetes, as its users meet it.
//!
//! One cluster is brought up for all subjects, each of which makes namespaces of its own. They run
//! in this order, since the last two change what is installed. When one fails, what explains it is
//! printed: events, pods, the ends of logs.

#![expect(
    clippy::unwrap_used,
    reason = "a test ends where something is not as it should be"
)]

mod probes;
mod roads;
mod sidecars;
mod stage;
mod wire;

use std::{
    process::ExitCode,
    sync::{Arc, Mutex},
};

use libtest_mimic::{Arguments, Trial};

use self::stage::{Stage, Test};

const SUBJECTS: &[(&str, Test)] = &[
    (
        "1_nodes_are_ready_and_pods_have_vpc_addresses",
        roads::addresses,
    ),
    (
        "1_dns_services_exec_logs_and_port_forward_work",
        roads::daily_work,
    ),
    ("1_who_may_call_whom_by_mode", roads::modes),
    (
        "1_probes_of_all_kinds_work_in_every_mode",
        probes::all_kinds,
    ),
    (
        "2_pods_of_a_labelled_namespace_get_sidecars",
        sidecars::injected,
    ),
    (
        "2_identity_is_by_projected_token_and_our_ca",
        sidecars::identity,
    ),
    (
        "3_curl_to_nginx_across_nodes_is_mtls_on_the_wire",
        wire::mtls,
    ),
    ("3_logs_metrics_and_one_trace_show_it", wire::telemetry),
];

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // One cluster, which two cores can carry.
    arguments.test_threads = Some(1);
    let stage = Arc::new(Mutex::new(Stage::default()));
    let trials = SUBJECTS.iter().map(|&(name, test)| {
        let stage = stage.clone();
        Trial::test(name, move || stage::run(&stage, name, test))
    });
    let conclusion = libtest_mimic::run(&arguments, trials.collect());
    drop(stage);
    conclusion.exit_code()
}
