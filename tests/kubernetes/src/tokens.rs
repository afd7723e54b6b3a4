//! Service accounts' tokens with claims that the API server would not give, signed as it signs.

use std::fs;

use anyhow::{Context as _, Result};
use aws_lc_rs::{
    rand::SystemRandom,
    signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair},
};
use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use rcgen::KeyPair;
use serde_json::{Value, json};

use crate::cluster::Cluster;

impl Cluster {
    /// A token of these claims, by the cluster's own key.
    pub fn token(&self, claims: &Value) -> Result<String> {
        let file = self.folder.join("keys/accounts.key");
        let pem = fs::read_to_string(&file).with_context(|| file.display().to_string())?;
        let der = KeyPair::from_pem(&pem)?.serialize_der();
        let key = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &der)
            .ok()
            .context("the key of service accounts is ECDSA P-256")?;
        // Without `kid` each key that the API server has is tried.
        let parts = [json!({"alg": "ES256", "typ": "JWT"}), claims.clone()];
        let parts = parts.map(|part| BASE64_URL_SAFE_NO_PAD.encode(part.to_string()));
        let signed = parts.join(".");
        let signature = key
            .sign(&SystemRandom::new(), signed.as_bytes())
            .ok()
            .context("signing")?;
        let signature = BASE64_URL_SAFE_NO_PAD.encode(signature.as_ref());
        Ok(format!("{signed}.{signature}"))
    }
}
