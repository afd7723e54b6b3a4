//! Turnpike on a real Kubernetes, as its users meet it.
//!
//! One cluster is brought up for all subjects, each of which makes namespaces of its own. They run
//! in this order, since the last two change what is installed. When one fails, what explains it is
//! printed: events, pods, the ends of logs.

mod bad_input;
mod egress;
mod kills;
mod kinds;
mod leftovers;
mod load;
mod probes;
mod roads;
mod rollout;
mod routes;
mod sidecars;
mod stage;
mod tour;
mod upgrade;
mod windows;
mod wire;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Trial};

use self::stage::Test;

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
        "2_a_token_for_another_audience_is_refused",
        sidecars::another_audience,
    ),
    (
        "3_curl_to_nginx_across_nodes_is_mtls_on_the_wire",
        wire::mtls,
    ),
    ("3_logs_metrics_and_one_trace_show_it", wire::telemetry),
    (
        "4_a_route_splits_and_retries_and_says_so",
        routes::split_and_retry,
    ),
    (
        "4_a_route_is_programmed_when_its_caller_has_it",
        routes::programmed_truly,
    ),
    (
        "4_a_broken_route_says_why_and_changes_nothing",
        routes::broken,
    ),
    (
        "5_no_request_fails_while_pods_roll_over_and_scale",
        rollout::under_load,
    ),
    (
        "6_an_egress_policy_holds_and_is_recorded",
        egress::held_and_recorded,
    ),
    (
        "6_a_new_pod_meets_no_open_window",
        windows::with_everything_there,
    ),
    (
        "6_no_open_window_without_the_controller",
        windows::without_the_controller,
    ),
    (
        "6_no_open_window_without_the_agent",
        windows::without_the_agent,
    ),
    (
        "6_no_open_window_without_the_gate",
        windows::without_the_gate,
    ),
    ("7_a_job_with_a_sidecar_ends", kinds::jobs_end),
    (
        "7_a_stateful_set_is_reached_by_its_pods_names",
        kinds::stateful_sets,
    ),
    (
        "7_a_pod_without_a_sidecar_calls_and_is_called_by_mode",
        kinds::beside_the_mesh,
    ),
    (
        "demo_the_tour_holds_and_its_walk_through_works",
        tour::holds,
    ),
    ("bad_labels", bad_input::labels),
    ("bad_a_label_that_comes_late", bad_input::a_late_label),
    ("bad_the_proxys_own_user", bad_input::the_proxys_user),
    ("bad_no_controller_yet", bad_input::no_controller_yet),
    ("bad_a_wrong_image", bad_input::a_wrong_image),
    ("bad_rights_taken_away", bad_input::rights_taken_away),
    (
        "bad_rights_lost_while_it_runs",
        bad_input::rights_lost_while_it_runs,
    ),
    ("bad_an_expired_token", bad_input::an_expired_token),
    ("8_the_controller_is_killed", kills::the_controller),
    ("8_agents_are_killed", kills::agents),
    ("8_a_gate_is_killed", kills::gates),
    ("8_the_audit_is_killed", kills::audit),
    ("8_a_sidecar_is_killed", kills::a_sidecar),
    ("8_a_node_is_killed", kills::a_node),
    ("9_an_upgrade_brings_another_proxy", upgrade::another_proxy),
    (
        "9_after_uninstall_pods_keep_their_network",
        upgrade::uninstall,
    ),
];

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // One cluster, which two cores can carry.
    arguments.test_threads = Some(1);
    let trials = SUBJECTS
        .iter()
        .map(|&(name, test)| Trial::test(name, move || stage::run(name, test)));
    let last = [
        Trial::test(
            "last_a_cluster_taken_down_leaves_nothing",
            stage::leaves_nothing,
        ),
        Trial::test("last_what_a_killed_run_left_is_removed", || {
            stage::alone(leftovers::of_a_killed_run)
        }),
    ];
    let conclusion = libtest_mimic::run(&arguments, trials.chain(last).collect());
    stage::down();
    conclusion.exit_code()
}
