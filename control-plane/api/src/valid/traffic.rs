//! TrafficPolicy.

use std::{sync::Arc, time::Duration};

use turnpike_rules::traffic::{self, TrafficPolicy as Policy};

use super::{Invalid, problems::Problems};
use crate::{
    Duration as Typed,
    kinds::{
        CircuitBreaker, OutlierEjection, Retry, RetryBudget, RetryConstraint, RetryRate, Timeouts,
        TrafficPolicy, TrafficPolicySpec,
    },
};

/// A TrafficPolicy with its defaults filled in, and the Services of its namespace that it targets.
#[derive(Clone, Debug, PartialEq)]
pub struct Traffic {
    pub targets: Vec<Arc<str>>,
    pub policy: Policy,
}

pub fn traffic_policy(object: &TrafficPolicy) -> Result<Traffic, Invalid> {
    let TrafficPolicySpec {
        target_refs,
        retry: typed_retry,
        retry_constraint,
        timeouts: typed_timeouts,
        circuit_breaker,
        outlier_ejection,
    } = &object.spec;
    let mut problems = Problems::default();
    if target_refs.is_empty() {
        problems.add(
            "spec.targetRefs",
            "[]",
            "name a Service, as in {kind: Service, name: web}",
        );
    }
    for (i, target) in target_refs.iter().enumerate() {
        if (&*target.group, &*target.kind) != ("", "Service") {
            let value = format!("{}/{}", target.group, target.kind);
            let allowed = "allowed is group \"\", kind Service";
            problems.add(format!("spec.targetRefs[{i}].kind"), value, allowed);
        }
        super::name(
            &mut problems,
            &format!("spec.targetRefs[{i}].name"),
            &target.name,
        );
    }
    let targets = target_refs
        .iter()
        .map(|target| target.name.as_str().into())
        .collect();
    let budget = budget(&mut problems, retry_constraint.as_ref());
    let policy = Policy {
        retry: retry(&mut problems, typed_retry.as_ref(), budget),
        timeouts: timeouts(&mut problems, typed_timeouts.as_ref()),
        circuit: circuit(&mut problems, circuit_breaker.as_ref()),
        outlier: outlier_ejection
            .as_ref()
            .map(|typed| outlier(&mut problems, typed)),
    };
    problems.finish(Traffic { targets, policy })
}

fn retry(
    problems: &mut Problems,
    typed: Option<&Retry>,
    budget: traffic::RetryBudget,
) -> traffic::Retry {
    let default = traffic::Retry {
        budget,
        ..traffic::Retry::default()
    };
    let Some(typed) = typed else { return default };
    let Retry {
        attempts,
        codes,
        grpc_codes,
        on_reset,
        non_idempotent,
        backoff,
    } = typed;
    let attempts = attempts.unwrap_or(default.attempts);
    if attempts > 10 {
        problems.add("spec.retry.attempts", attempts, "allowed are 0 to 10");
    }
    for (i, code) in codes.iter().enumerate() {
        if !(400..=599).contains(code) {
            let allowed = "allowed are response statuses from 400 to 599";
            problems.add(format!("spec.retry.codes[{i}]"), code, allowed);
        }
    }
    for (i, code) in grpc_codes.iter().enumerate() {
        if !(1..=16).contains(code) {
            let allowed = "allowed are gRPC statuses from 1 to 16";
            problems.add(format!("spec.retry.grpcCodes[{i}]"), code, allowed);
        }
    }
    let mut wait = default.backoff;
    if let Some(typed) = backoff {
        wait.base = typed.base.map_or(wait.base, Typed::std);
        wait.max = typed.max.map_or(wait.max.max(wait.base), Typed::std);
        if wait.base.is_zero() || wait.max < wait.base {
            let value = format!("base {:?}, max {:?}", wait.base, wait.max);
            problems.add(
                "spec.retry.backoff",
                value,
                "base is above 0s and not above max",
            );
        }
    }
    traffic::Retry {
        attempts,
        conditions: traffic::RetryConditions {
            statuses: codes.clone(),
            reset: *on_reset,
            grpc: grpc_codes.clone(),
            non_idempotent: *non_idempotent,
        },
        backoff: wait,
        ..default
    }
}

fn budget(problems: &mut Problems, typed: Option<&RetryConstraint>) -> traffic::RetryBudget {
    let mut valid = traffic::RetryBudget::default();
    let Some(RetryConstraint {
        budget,
        min_retry_rate,
    }) = typed
    else {
        return valid;
    };
    if let Some(RetryBudget { percent, interval }) = budget {
        if let Some(percent) = *percent {
            if percent > 100 {
                let allowed = "allowed are 0 to 100";
                problems.add("spec.retryConstraint.budget.percent", percent, allowed);
            }
            valid.percent = f64::from(percent);
        }
        if let Some(interval) = interval.filter(|i| i.std() != Duration::from_secs(10)) {
            let allowed = "allowed is 10s, the interval over which the budget is kept";
            problems.add("spec.retryConstraint.budget.interval", interval, allowed);
        }
    }
    if let Some(RetryRate { count, interval }) = min_retry_rate {
        let count = u64::from(count.unwrap_or(valid.min_per_second));
        let millis = interval.map_or(1000, |i| i.std().as_millis().try_into().unwrap_or(u64::MAX));
        if millis == 0 {
            let allowed = "allowed are intervals above 0s";
            problems.add("spec.retryConstraint.minRetryRate.interval", "0s", allowed);
        }
        let per_second = (count * 1000).div_ceil(millis.max(1));
        valid.min_per_second = u32::try_from(per_second).unwrap_or(u32::MAX);
    }
    valid
}

fn timeouts(problems: &mut Problems, typed: Option<&Timeouts>) -> traffic::Timeouts {
    let default = traffic::Timeouts::default();
    let Some(typed) = typed else { return default };
    let Timeouts {
        connect,
        request,
        backend_request,
        idle,
    } = *typed;
    // `0s` is no timeout.
    let set = |typed: Option<Typed>, default: Option<Duration>| match typed {
        Some(typed) => Some(typed.std()).filter(|d| !d.is_zero()),
        None => default,
    };
    if connect.is_some_and(|connect| connect.std().is_zero()) {
        problems.add(
            "spec.timeouts.connect",
            "0s",
            "a connection must be given some time",
        );
    }
    let valid = traffic::Timeouts {
        connect: connect.map_or(default.connect, Typed::std),
        request: set(request, default.request),
        per_try: set(backend_request, default.per_try),
        idle: set(idle, default.idle),
    };
    if let (Some(try_), Some(whole)) = (valid.per_try, valid.request)
        && try_ > whole
    {
        let allowed = format!("one try may not take longer than the whole request, {whole:?}");
        problems.add("spec.timeouts.backendRequest", format!("{try_:?}"), allowed);
    }
    valid
}

fn circuit(problems: &mut Problems, typed: Option<&CircuitBreaker>) -> traffic::CircuitBreaker {
    let default = traffic::CircuitBreaker::default();
    let Some(typed) = typed else { return default };
    let CircuitBreaker {
        max_connections,
        max_pending_requests,
        max_requests,
    } = *typed;
    for (name, value) in [
        ("maxConnections", max_connections),
        ("maxRequests", max_requests),
    ] {
        if value == Some(0) {
            let allowed = "allowed are 1 and more: 0 would let nothing through";
            problems.add(format!("spec.circuitBreaker.{name}"), 0, allowed);
        }
    }
    traffic::CircuitBreaker {
        max_connections: max_connections.unwrap_or(default.max_connections),
        max_pending: max_pending_requests.unwrap_or(default.max_pending),
        max_requests: max_requests.unwrap_or(default.max_requests),
    }
}

fn outlier(problems: &mut Problems, typed: &OutlierEjection) -> traffic::OutlierEjection {
    let OutlierEjection {
        consecutive_failures,
        base_ejection,
        max_ejection,
        max_percent,
    } = *typed;
    let default = traffic::OutlierEjection::default();
    let base = base_ejection.map_or(default.base_ejection, Typed::std);
    let valid = traffic::OutlierEjection {
        consecutive_failures: consecutive_failures.unwrap_or(default.consecutive_failures),
        base_ejection: base,
        max_ejection: max_ejection.map_or(default.max_ejection.max(base), Typed::std),
        max_percent: max_percent.unwrap_or(default.max_percent),
    };
    if valid.consecutive_failures == 0 {
        let allowed = "allowed are 1 and more";
        problems.add("spec.outlierEjection.consecutiveFailures", 0, allowed);
    }
    if valid.max_percent > 100 {
        let allowed = "allowed are 0 to 100";
        problems.add(
            "spec.outlierEjection.maxPercent",
            valid.max_percent,
            allowed,
        );
    }
    if base.is_zero() || valid.max_ejection < base {
        let value = format!("{:?}, at most {:?}", base, valid.max_ejection);
        let allowed = "baseEjection is above 0s and not above maxEjection";
        problems.add("spec.outlierEjection.baseEjection", value, allowed);
    }
    valid
}
