use proptest::prelude::*;

use super::*;
use crate::path;

proptest! {
    /// So it is enough to ask a pattern about the path as it stands.
    #[test]
    fn a_pattern_that_matches_a_path_matches_its_lenient_reading(
        pattern in "(/[ab]{0,2}(;a)?(%3A)?){1,3}",
        rest in "(/[ab;]{0,3}(%3A)?){0,3}",
    ) {
        let text = format!("{pattern}{rest}");
        let second = path::lenient(&text).unwrap_or(text.clone());
        for pattern in [PathMatch::prefix(&pattern), PathMatch::Exact(pattern.into())] {
            let read = |t: &str| path::lenient(t).unwrap_or(t.to_owned());
            let lenient = match &pattern {
                PathMatch::Exact(text) => PathMatch::Exact(read(text).into()),
                PathMatch::Prefix(text) => PathMatch::prefix(&read(text)),
            };
            if pattern.matches(&text) {
                prop_assert!(lenient.matches(&second), "{pattern:?} {text} {second}");
            }
        }
    }

    /// Whatever is claimed: through a rule of hosts, a connection passes only to an address
    /// that this pod resolved for the very name it claims.
    #[test]
    fn hosts_never_pass_unbound(
        address in any::<[u8; 4]>(),
        port in prop_oneof![Just(443u16), Just(80), any::<u16>()],
        name in prop_oneof![Just("api.payments.example"), Just("x.s3.amazonaws.com"),
                            Just("attacker.example"), Just("")],
        bound in proptest::sample::subsequence(
            vec!["api.payments.example", "x.s3.amazonaws.com", "attacker.example"], 0..=3),
        kind in prop_oneof![Just("tls"), Just("http"), Just("tcp"), Just("udp")],
    ) {
        let address = std::net::Ipv4Addr::from(address).to_string();
        let verdict = connect(&payments(), &address, port, (kind, name), &bound);
        let by_host = verdict.rule.as_deref() == Some("allow[0]");
        if verdict.allowed && by_host {
            prop_assert!(bound.contains(&name) && name != "attacker.example");
            prop_assert!(kind == "tls" && port == 443);
            let address = address.parse().unwrap();
            prop_assert!(crate::address::special(address).is_none());
        }
    }
}
