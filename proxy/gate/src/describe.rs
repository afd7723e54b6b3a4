//! Verdicts in the words of the record.

use turnpike_ledger::record::{Assurance, RuleRef, Verdict as Recorded};
use turnpike_rules::egress::{Grade, Verdict};

/// Text of peers in a record is at most this long.
const MAX_TEXT: usize = 255;

pub(crate) fn rule(verdict: &Verdict) -> Option<RuleRef> {
    Some(RuleRef {
        policy: verdict.policy.as_deref()?.to_owned(),
        version: verdict.version.as_deref().unwrap_or_default().to_owned(),
        id: verdict.rule.as_deref().unwrap_or_default().to_owned(),
    })
}

pub(crate) fn verdict(verdict: &Verdict) -> Recorded {
    match (verdict.allowed, verdict.would_deny) {
        (true, false) => Recorded::Allowed,
        (true, true) => Recorded::AuditWouldDeny,
        (false, _) => Recorded::Denied,
    }
}

/// None where there is nothing to explain.
pub(crate) fn reason(verdict: &Verdict) -> Option<String> {
    (!verdict.allowed || verdict.would_deny).then(|| verdict.reason.to_string())
}

pub(crate) fn assurance(grade: Grade) -> Assurance {
    match grade {
        Grade::L3 => Assurance::L3,
        Grade::DnsBound => Assurance::DnsBound,
        Grade::SniDns => Assurance::SniDns,
        Grade::CertificateVerified => Assurance::CertificateVerified,
        Grade::HttpVerified => Assurance::HttpVerified,
    }
}

/// What a peer sent, as much of it as a record holds.
pub(crate) fn bounded(text: &str) -> String {
    text.chars().take(MAX_TEXT).collect()
}
