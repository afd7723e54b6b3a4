//! Who calls: the access key and session token of a SigV4 signature must be a set that the
//! metadata service handed out. The signature itself is not computed.

use http::{header::AUTHORIZATION, request::Parts};

use crate::{
    credentials::Issuer,
    world::{Now, Refusal},
};

pub(super) fn check(head: &Parts, issuer: &Issuer, now: Now) -> Result<(), Refusal> {
    let refuse = |reason: &str| {
        let message = format!("You are not authorized to perform this operation: {reason}");
        Err(Refusal::unauthorized(message))
    };
    let header = |name: &str| head.headers.get(name).and_then(|value| value.to_str().ok());
    let Some(authorization) = header(AUTHORIZATION.as_str()) else {
        return refuse("the request is not signed");
    };
    let Some(access_key) = access_key(authorization) else {
        return refuse("the Authorization header is not an AWS4-HMAC-SHA256 signature");
    };
    let token = header("x-amz-security-token").unwrap_or_default();
    if !issuer.accepts(access_key, token, now) {
        return refuse("the access key and session token are not ones that instance metadata gave");
    }
    Ok(())
}

/// `AWS4-HMAC-SHA256 Credential=KEY/DATE/REGION/ec2/aws4_request, SignedHeaders=…, Signature=…`
fn access_key(authorization: &str) -> Option<&str> {
    let fields = authorization.strip_prefix("AWS4-HMAC-SHA256")?;
    let field = |name: &str| {
        fields
            .split(',')
            .find_map(|field| field.trim().strip_prefix(name)?.strip_prefix('='))
    };
    let signature = field("Signature")?;
    if signature.len() != 64 || !signature.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    field("SignedHeaders")?;
    let scope: Vec<&str> = field("Credential")?.split('/').collect();
    match scope[..] {
        [key, _date, _region, "ec2", "aws4_request"] => Some(key),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::access_key;

    #[test]
    fn only_a_whole_signature_names_a_key() {
        let signature = "a".repeat(64);
        let good = format!(
            "AWS4-HMAC-SHA256 Credential=ASIAX/20260101/eu-west-1/ec2/aws4_request, \
             SignedHeaders=host;x-amz-date, Signature={signature}"
        );
        assert_eq!(access_key(&good), Some("ASIAX"));
        for bad in [
            "",
            "Bearer abc",
            "AWS4-HMAC-SHA256 Credential=ASIAX",
            &good.replace(&signature, "abc"),
            &good.replace("/ec2/", "/s3/"),
            &good.replace("SignedHeaders=", "Signed="),
            &good.replace("AWS4-HMAC-SHA256", "AWS3"),
        ] {
            assert_eq!(access_key(bad), None, "{bad}");
        }
    }
}
