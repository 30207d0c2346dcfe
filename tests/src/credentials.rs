//! Operators, accounts and users as nats-server knows them (its decentralised authentication): made here,
//! with keys that live as long as a test.

use data_encoding::BASE64URL_NOPAD;
use nkeys::KeyPair;
use serde_json::{Value, json};
use std::time::{SystemTime, UNIX_EPOCH};

/// An operator: whoever a server trusts.
#[derive(Debug)]
pub struct Operator(KeyPair);

/// An account of it.
#[derive(Debug)]
pub struct Account(KeyPair);

impl Default for Operator {
    fn default() -> Self {
        Self(KeyPair::new_operator())
    }
}

impl Operator {
    /// A new account.
    #[must_use]
    pub fn account(&self) -> Account {
        Account(KeyPair::new_account())
    }

    /// A server's configuration that lets in the users of `account`, but for the `revoked` ones (public keys).
    #[must_use]
    pub fn server(&self, account: &Account, revoked: &[&str]) -> String {
        let key = self.0.public_key();
        let operator = sign(&self.0, &key, json!({"type": "operator", "version": 2}));
        let revocations = revoked
            .iter()
            .map(|user| ((*user).to_owned(), json!(now() + 60)));
        let claims = json!({
            "type": "account", "version": 2,
            "limits": {"subs": -1, "data": -1, "payload": -1, "imports": -1, "exports": -1,
                "wildcards": true, "conn": -1, "leaf": -1},
            "revocations": Value::Object(revocations.collect()),
        });
        let key = account.0.public_key();
        let account = sign(&self.0, &key, claims);
        format!(
            "operator: {operator}\nresolver: MEMORY\nresolver_preload: {{ {key}: {account} }}\n"
        )
    }
}

impl Account {
    /// A new user: its public key, its JWT and its seed.
    #[must_use]
    pub fn user(&self) -> (String, String, String) {
        let user = KeyPair::new_user();
        let claims = json!({"type": "user", "version": 2, "pub": {}, "sub": {}, "subs": -1, "data": -1, "payload": -1});
        let jwt = sign(&self.0, &user.public_key(), claims);
        (user.public_key(), jwt, user.seed().expect("it has one"))
    }

    /// A `.creds` file of a new user, and its public key.
    #[must_use]
    pub fn creds(&self) -> (String, String) {
        let (key, jwt, seed) = self.user();
        let creds = format!(
            "-----BEGIN NATS USER JWT-----\n{jwt}\n------END NATS USER JWT------\n\n\
             -----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"
        );
        (key, creds)
    }
}

fn sign(issuer: &KeyPair, subject: &str, nats: Value) -> String {
    let header = json!({"typ": "JWT", "alg": "ed25519-nkey"});
    let claims = json!({"jti": subject, "iat": now(), "iss": issuer.public_key(), "name": "test", "sub": subject, "nats": nats});
    let encoded = |value: Value| BASE64URL_NOPAD.encode(value.to_string().as_bytes());
    let text = format!("{}.{}", encoded(header), encoded(claims));
    let signature = issuer.sign(text.as_bytes()).expect("it has a seed");
    format!("{text}.{}", BASE64URL_NOPAD.encode(&signature))
}

fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.expect("after 1970").as_secs()
}
