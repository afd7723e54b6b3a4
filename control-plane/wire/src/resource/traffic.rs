//! Limits, retries and timeouts.

use std::time::Duration;

use turnpike_rules::traffic::{
    Backoff, CircuitBreaker, OutlierEjection, Retry, RetryBudget, RetryConditions, Timeouts,
    TrafficPolicy,
};

use super::field::{FieldError, Read, each, millis, optional, within};
use crate::mesh as pb;

/// A part that is left out has its default.
pub(super) fn policy(message: pb::TrafficPolicy) -> Read<TrafficPolicy> {
    let pb::TrafficPolicy {
        retry,
        timeouts,
        circuit,
        outlier,
    } = message;
    Ok(TrafficPolicy {
        retry: optional("retry", retry, self::retry)?.unwrap_or_default(),
        timeouts: optional("timeouts", timeouts, self::timeouts)?.unwrap_or_default(),
        circuit: circuit.map(self::circuit).unwrap_or_default(),
        outlier: optional("outlier", outlier, self::outlier)?,
    })
}

fn retry(message: pb::Retry) -> Read<Retry> {
    let pb::Retry {
        attempts,
        conditions,
        budget,
        backoff,
    } = message;
    Ok(Retry {
        attempts,
        conditions: optional("conditions", conditions, self::conditions)?.unwrap_or_default(),
        budget: optional("budget", budget, self::budget)?.unwrap_or_default(),
        backoff: optional("backoff", backoff, self::backoff)?.unwrap_or_default(),
    })
}

pub(super) fn conditions(message: pb::RetryConditions) -> Read<RetryConditions> {
    let pb::RetryConditions {
        statuses,
        reset,
        grpc,
        non_idempotent,
    } = message;
    let statuses = each("statuses", statuses, |status| match u16::try_from(status) {
        Ok(status @ 100..=599) => Ok(status),
        _ => Err(FieldError::new("", format!("{status} is no HTTP status"))),
    })?;
    Ok(RetryConditions {
        statuses,
        reset,
        grpc,
        non_idempotent,
    })
}

fn budget(message: pb::RetryBudget) -> Read<RetryBudget> {
    let pb::RetryBudget {
        percent,
        min_per_second,
    } = message;
    if !(0.0..=1000.0).contains(&percent) {
        return Err(FieldError::new(
            "percent",
            format!("{percent} is not from 0 to 1000"),
        ));
    }
    Ok(RetryBudget {
        percent,
        min_per_second,
    })
}

pub(super) fn backoff(message: pb::Backoff) -> Read<Backoff> {
    let pb::Backoff { base_ms, max_ms } = message;
    if base_ms > max_ms {
        return Err(FieldError::new(
            "base_ms",
            format!("{base_ms} is more than max_ms, {max_ms}"),
        ));
    }
    Ok(Backoff {
        base: Duration::from_millis(base_ms),
        max: Duration::from_millis(max_ms),
    })
}

fn timeouts(message: pb::Timeouts) -> Read<Timeouts> {
    let pb::Timeouts {
        connect_ms,
        request_ms,
        per_try_ms,
        idle_ms,
    } = message;
    if connect_ms == 0 {
        return Err(FieldError::new("connect_ms", "must be at least 1"));
    }
    Ok(Timeouts {
        connect: Duration::from_millis(connect_ms),
        request: request_ms.map(Duration::from_millis),
        per_try: per_try_ms.map(Duration::from_millis),
        idle: idle_ms.map(Duration::from_millis),
    })
}

fn circuit(message: pb::CircuitBreaker) -> CircuitBreaker {
    let pb::CircuitBreaker {
        max_connections,
        max_pending,
        max_requests,
    } = message;
    CircuitBreaker {
        max_connections,
        max_pending,
        max_requests,
    }
}

fn outlier(message: pb::OutlierEjection) -> Read<OutlierEjection> {
    let pb::OutlierEjection {
        consecutive_failures,
        base_ejection_ms,
        max_ejection_ms,
        max_percent,
    } = message;
    if consecutive_failures == 0 {
        return Err(FieldError::new(
            "consecutive_failures",
            "must be at least 1",
        ));
    }
    if max_percent > 100 {
        return Err(FieldError::new(
            "max_percent",
            format!("{max_percent} is more than 100"),
        ));
    }
    let times = pb::Backoff {
        base_ms: base_ejection_ms,
        max_ms: max_ejection_ms,
    };
    let Backoff { base, max } = within("ejection", backoff(times))?;
    Ok(OutlierEjection {
        consecutive_failures,
        base_ejection: base,
        max_ejection: max,
        max_percent,
    })
}

impl From<&TrafficPolicy> for pb::TrafficPolicy {
    fn from(policy: &TrafficPolicy) -> Self {
        let TrafficPolicy {
            retry,
            timeouts,
            circuit,
            outlier,
        } = policy;
        Self {
            retry: Some(retry.into()),
            timeouts: Some(timeouts.into()),
            circuit: Some(circuit.into()),
            outlier: outlier.as_ref().map(Into::into),
        }
    }
}

impl From<&Retry> for pb::Retry {
    fn from(retry: &Retry) -> Self {
        let Retry {
            attempts,
            conditions,
            budget,
            backoff,
        } = retry;
        let RetryBudget {
            percent,
            min_per_second,
        } = *budget;
        Self {
            attempts: *attempts,
            conditions: Some(conditions.into()),
            budget: Some(pb::RetryBudget {
                percent,
                min_per_second,
            }),
            backoff: Some(backoff.into()),
        }
    }
}

impl From<&RetryConditions> for pb::RetryConditions {
    fn from(conditions: &RetryConditions) -> Self {
        let RetryConditions {
            statuses,
            reset,
            grpc,
            non_idempotent,
        } = conditions;
        Self {
            statuses: statuses.iter().map(|status| (*status).into()).collect(),
            reset: *reset,
            grpc: grpc.clone(),
            non_idempotent: *non_idempotent,
        }
    }
}

impl From<&Backoff> for pb::Backoff {
    fn from(backoff: &Backoff) -> Self {
        Self {
            base_ms: millis(backoff.base),
            max_ms: millis(backoff.max),
        }
    }
}

impl From<&Timeouts> for pb::Timeouts {
    fn from(timeouts: &Timeouts) -> Self {
        let Timeouts {
            connect,
            request,
            per_try,
            idle,
        } = *timeouts;
        Self {
            connect_ms: millis(connect),
            request_ms: request.map(millis),
            per_try_ms: per_try.map(millis),
            idle_ms: idle.map(millis),
        }
    }
}

impl From<&CircuitBreaker> for pb::CircuitBreaker {
    fn from(circuit: &CircuitBreaker) -> Self {
        let CircuitBreaker {
            max_connections,
            max_pending,
            max_requests,
        } = *circuit;
        Self {
            max_connections,
            max_pending,
            max_requests,
        }
    }
}

impl From<&OutlierEjection> for pb::OutlierEjection {
    fn from(outlier: &OutlierEjection) -> Self {
        let OutlierEjection {
            consecutive_failures,
            base_ejection,
            max_ejection,
            max_percent,
        } = *outlier;
        Self {
            consecutive_failures,
            base_ejection_ms: millis(base_ejection),
            max_ejection_ms: millis(max_ejection),
            max_percent,
        }
    }
}
