//! EC2's answers, sorted by what to do about them.

use aws_sdk_ec2::error::{ProvideErrorMetadata, SdkError};

/// Why a call failed, a variant for each thing that a caller does about it.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum CloudError {
    /// Nothing was done; ask again later, and less.
    #[error("{operation}: EC2 throttles this account's calls ({code})")]
    Throttled {
        operation: &'static str,
        code: String,
    },
    /// The interface holds as many addresses as its instance type allows. The caller's view is
    /// old: look again.
    #[error("{operation}: the interface holds no more addresses: {message}")]
    AddressLimit {
        operation: &'static str,
        message: String,
    },
    /// The instance, or the account, holds no more interfaces.
    #[error("{operation}: no more interfaces: {message}")]
    InterfaceLimit {
        operation: &'static str,
        message: String,
    },
    /// The subnet has no address left. Another subnet may; more calls to this one do not help.
    #[error(
        "{operation}: the subnet has no free addresses: {message}; free some, or add a subnet \
         tagged kubernetes.io/role/cni=1"
    )]
    SubnetExhausted {
        operation: &'static str,
        message: String,
    },
    /// It was done before, or is what was asked for already.
    #[error("{operation}: done already: {message}")]
    Already {
        operation: &'static str,
        message: String,
    },
    /// What was named is not there (any more, or yet).
    #[error("{operation}: not found: {message}")]
    NotFound {
        operation: &'static str,
        message: String,
    },
    /// In a state, or in use in a way, that does not allow it now.
    #[error("{operation}: not possible now: {message}")]
    NotNow {
        operation: &'static str,
        message: String,
    },
    #[error(
        "{operation}: not authorised: {message}; add ec2:{operation} to the policy of the node's \
         role"
    )]
    Unauthorized {
        operation: &'static str,
        message: String,
    },
    /// EC2 refuses for another reason: asking the same again gives the same.
    #[error("{operation}: {code}: {message}")]
    Refused {
        operation: &'static str,
        code: String,
        message: String,
    },
    /// Nothing was sent.
    #[error("{operation}: not reached: {reason}")]
    Unreachable {
        operation: &'static str,
        reason: String,
    },
    /// Sent, and no usable answer came. It may have been done: describe before a retry.
    #[error("{operation}: outcome unknown: {reason}")]
    Unknown {
        operation: &'static str,
        reason: String,
    },
    /// The answer lacks what the API promises.
    #[error("{operation}: the answer has no {what}")]
    Incomplete {
        operation: &'static str,
        what: &'static str,
    },
    #[error("instance metadata {path}: {reason}")]
    Metadata { path: String, reason: String },
}

impl CloudError {
    /// True where the call may have had its effect.
    pub fn is_unknown(&self) -> bool {
        matches!(self, Self::Unknown { .. } | Self::Incomplete { .. })
    }

    /// For counting by kind: a bounded set of words.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Throttled { .. } => "throttled",
            Self::AddressLimit { .. } => "address_limit",
            Self::InterfaceLimit { .. } => "interface_limit",
            Self::SubnetExhausted { .. } => "subnet_exhausted",
            Self::Already { .. } => "already",
            Self::NotFound { .. } => "not_found",
            Self::NotNow { .. } => "not_now",
            Self::Unauthorized { .. } => "unauthorized",
            Self::Refused { .. } => "refused",
            Self::Unreachable { .. } => "unreachable",
            Self::Unknown { .. } => "unknown",
            Self::Incomplete { .. } => "incomplete",
            Self::Metadata { .. } => "metadata",
        }
    }
}

/// Sorts an answer by code, and by message where one code says several things.
pub fn classify(operation: &'static str, status: u16, code: &str, message: &str) -> CloudError {
    let message = message.to_owned();
    let exhausted = |message: &str| {
        let message = message.to_ascii_lowercase();
        message.contains("sufficient free") || message.contains("insufficient")
    };
    match code {
        "RequestLimitExceeded"
        | "Throttling"
        | "ThrottlingException"
        | "RequestThrottled"
        | "RequestThrottledException"
        | "TooManyRequestsException"
        | "EC2ThrottledException" => CloudError::Throttled {
            operation,
            code: code.to_owned(),
        },
        "PrivateIpAddressLimitExceeded" | "InvalidInterface.IpAddressLimitExceeded" => {
            CloudError::AddressLimit { operation, message }
        }
        "AttachmentLimitExceeded" | "NetworkInterfaceLimitExceeded" => {
            CloudError::InterfaceLimit { operation, message }
        }
        "InsufficientFreeAddressesInSubnet" | "InsufficientCidrBlocks" => {
            CloudError::SubnetExhausted { operation, message }
        }
        "InvalidParameterValue" if exhausted(&message) => {
            CloudError::SubnetExhausted { operation, message }
        }
        "InvalidNetworkInterface.InUse"
        | "IncorrectState"
        | "IncorrectInstanceState"
        | "OperationNotPermitted"
        | "DependencyViolation"
        | "InvalidIPAddress.InUse" => CloudError::NotNow { operation, message },
        "UnauthorizedOperation"
        | "AuthFailure"
        | "AccessDenied"
        | "AccessDeniedException"
        | "OptInRequired"
        | "Blocked"
        | "InvalidClientTokenId"
        | "ExpiredToken"
        | "SignatureDoesNotMatch" => CloudError::Unauthorized { operation, message },
        "PrivateIpAddressAlreadyAssigned" => CloudError::Already { operation, message },
        _ if code.ends_with(".NotFound") => CloudError::NotFound { operation, message },
        // EC2 says itself that it does not know: "InternalError: … retry".
        _ if status >= 500 => CloudError::Unknown {
            operation,
            reason: format!("{status} {code}: {message}"),
        },
        _ => CloudError::Refused {
            operation,
            code: code.to_owned(),
            message,
        },
    }
}

pub(crate) fn from_sdk<E>(operation: &'static str, error: SdkError<E>) -> CloudError
where
    E: ProvideErrorMetadata + std::error::Error + 'static,
{
    let reason = || reasons(&error);
    match &error {
        SdkError::ConstructionFailure(_) => CloudError::Unreachable {
            operation,
            reason: reason(),
        },
        // A connection that never stood carried no request.
        SdkError::DispatchFailure(failure)
            if failure.is_user() || (failure.is_io() && never_connected(&error)) =>
        {
            CloudError::Unreachable {
                operation,
                reason: reason(),
            }
        }
        SdkError::ServiceError(context) => {
            let (code, message) = (context.err().code(), context.err().message());
            let status = context.raw().status().as_u16();
            classify(
                operation,
                status,
                code.unwrap_or("unnamed"),
                message.unwrap_or(""),
            )
        }
        _ => CloudError::Unknown {
            operation,
            reason: reason(),
        },
    }
}

fn never_connected(error: &(dyn std::error::Error + 'static)) -> bool {
    let refused = |error: &(dyn std::error::Error + 'static)| {
        error.downcast_ref::<std::io::Error>().is_some_and(|io| {
            matches!(
                io.kind(),
                std::io::ErrorKind::ConnectionRefused
                    | std::io::ErrorKind::HostUnreachable
                    | std::io::ErrorKind::NetworkUnreachable
                    | std::io::ErrorKind::AddrNotAvailable
            )
        })
    };
    chain(error).any(refused)
}

fn chain<'a>(
    error: &'a (dyn std::error::Error + 'static),
) -> impl Iterator<Item = &'a (dyn std::error::Error + 'static)> {
    std::iter::successors(Some(error), |error| error.source())
}

/// The error and its causes in one line.
pub(crate) fn reasons(error: &(dyn std::error::Error + 'static)) -> String {
    chain(error)
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(": ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_code_with_two_meanings_is_told_apart_by_its_message() {
        let full = "There aren't sufficient free Ipv4 addresses or prefixes";
        let kind = |message| {
            classify(
                "CreateNetworkInterface",
                400,
                "InvalidParameterValue",
                message,
            )
            .kind()
        };
        assert_eq!(kind(full), "subnet_exhausted");
        assert_eq!(kind("Value (x) for parameter y is invalid"), "refused");
    }

    #[test]
    fn codes_are_sorted_by_what_to_do() {
        for (status, code, kind) in [
            (503, "RequestLimitExceeded", "throttled"),
            (400, "PrivateIpAddressLimitExceeded", "address_limit"),
            (
                400,
                "InvalidInterface.IpAddressLimitExceeded",
                "address_limit",
            ),
            (400, "AttachmentLimitExceeded", "interface_limit"),
            (400, "InsufficientFreeAddressesInSubnet", "subnet_exhausted"),
            (400, "InsufficientCidrBlocks", "subnet_exhausted"),
            (400, "InvalidNetworkInterface.InUse", "not_now"),
            (400, "InvalidNetworkInterfaceID.NotFound", "not_found"),
            (403, "UnauthorizedOperation", "unauthorized"),
            (500, "InternalError", "unknown"),
            (503, "Unavailable", "unknown"),
            (400, "InvalidParameterCombination", "refused"),
        ] {
            assert_eq!(classify("X", status, code, "").kind(), kind, "{code}");
        }
    }

    #[test]
    fn a_refused_permission_names_what_to_add() {
        let error = classify(
            "AssignPrivateIpAddresses",
            403,
            "UnauthorizedOperation",
            "no",
        );
        assert!(
            error.to_string().contains("ec2:AssignPrivateIpAddresses"),
            "{error}"
        );
    }
}
