//! Where the bus is, and as whom this host is known there.
//!
//! Four places may say so, each in the words of the `nats` command: the flag `--nats`, the environment
//! (`NATS_*`), the configuration (`[nats]`), and a context of that command. Of each thing the first place
//! that names it is asked: of the servers, of the whole way to log in, of the certificate and its key, and
//! of the rest one by one. So a user of one place never gets the password of another.
//!
//! Users and passwords are taken out of the URLs: the client does not use them (0.51), and logs them.
//! Secrets in files are read again at each connect, so a new one needs no restart, and one that is
//! missing keeps no agent from starting: apps are adopted, and the file is waited for like a server.

use crate::config::{Nats, Secret};
use crate::host::blocking;
use crate::instances::droplets::percent_decode;
use async_nats::{Auth, AuthError, ConnectOptions, ServerAddr};
use nkeys::KeyPair;
use serde::Deserialize;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Where a bus is looked for that nobody has named.
const DEFAULT_URL: &str = "nats://127.0.0.1:4222";

/// How long one attempt to connect may take, where nothing else is said.
const PATIENCE: Duration = Duration::from_secs(5);
/// The least and the most that can be said.
const LEAST_PATIENCE: Duration = Duration::from_millis(100);
const MOST_PATIENCE: Duration = Duration::from_secs(600);

/// What is wrong with the settings; never with a secret in it.
#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    /// One of them cannot be used.
    #[error("{setting} {problem}")]
    Setting {
        /// Which, as it is written in its place.
        setting: String,
        /// What is wrong, and what would be right.
        problem: String,
    },
    /// A context's file.
    #[error("cannot use the context {path}: {problem}")]
    Context {
        /// Which file.
        path: PathBuf,
        /// Why.
        problem: String,
    },
}

/// How to connect, ready for use. Its `Debug` has no secret.
#[derive(Debug, PartialEq, Eq)]
pub struct Access {
    /// Without users and passwords; at least one.
    pub(super) servers: Vec<ServerAddr>,
    proof: Proof,
    cert: Option<(PathBuf, PathBuf)>,
    ca: Option<PathBuf>,
    tls_first: bool,
    /// What subjects for answers begin with, if not the usual.
    pub(super) inbox_prefix: Option<String>,
    patience: Duration,
}

/// What is shown to the server.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Proof {
    Nothing,
    Password { user: Secret, password: Secret },
    Token(Secret),
    Creds(PathBuf),
    Nkey(PathBuf),
    Jwt { jwt: Secret, seed: Secret },
}

/// The environment and where contexts are, as far as they matter here.
#[derive(Debug, Default)]
pub struct Surroundings {
    /// `NATS_*`, without empty ones.
    pub nats: Nats,
    /// Where the `nats` command keeps its settings: `$XDG_CONFIG_HOME/nats`, else `$HOME/.config/nats`.
    pub settings: Option<PathBuf>,
    /// `$HOME`, for `~` in contexts.
    pub home: Option<PathBuf>,
}

impl Surroundings {
    /// As `variable` gives them.
    #[must_use]
    pub fn of(variable: impl Fn(&str) -> Option<String>) -> Self {
        let get = |name: &str| variable(name).filter(|value| !value.is_empty());
        let secret = |name| get(name).map(Secret);
        let path = |name| get(name).map(PathBuf::from);
        let home = path("HOME");
        let config = path("XDG_CONFIG_HOME").or_else(|| Some(home.as_ref()?.join(".config")));
        Self {
            nats: Nats {
                url: secret("NATS_URL"),
                context: get("NATS_CONTEXT"),
                user: secret("NATS_USER"),
                password: secret("NATS_PASSWORD"),
                token: secret("NATS_TOKEN"),
                creds: path("NATS_CREDS"),
                nkey: path("NATS_NKEY"),
                jwt: secret("NATS_JWT"),
                seed: secret("NATS_SEED"),
                cert: path("NATS_CERT"),
                key: path("NATS_KEY"),
                ca: path("NATS_CA"),
                timeout: get("NATS_TIMEOUT"),
                ..Nats::default()
            },
            settings: config.map(|config| config.join("nats")),
            home,
        }
    }
}

/// One of the places, with what it says.
struct Place {
    kind: Kind,
    nats: Nats,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Flag,
    Environment,
    File,
    Context,
}

impl Place {
    /// `setting` as it is written here.
    fn name(&self, setting: &str) -> String {
        match self.kind {
            Kind::Flag => "--nats".to_owned(),
            Kind::Environment => format!("NATS_{}", setting.to_uppercase()),
            Kind::File => format!("nats.{setting}"),
            Kind::Context => format!("`{setting}` of the context"),
        }
    }

    fn wrong(&self, setting: &str, problem: impl Into<String>) -> AccessError {
        AccessError::Setting {
            setting: self.name(setting),
            problem: problem.into(),
        }
    }
}

impl Access {
    /// Puts together what all places say. Reads the file of a context, if one is chosen.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn gather(file: &Nats, around: Surroundings) -> Result<Self, AccessError> {
        let flag = Nats {
            url: file.flag.clone(),
            ..Nats::default()
        };
        let context = context(&[&around.nats, file], flag.url.is_some(), &around)?;
        let places = [
            (Kind::Flag, flag),
            (Kind::Environment, around.nats),
            (Kind::File, file.clone()),
            (Kind::Context, context.unwrap_or_default()),
        ];
        Self::of(&places.map(|(kind, nats)| Place { kind, nats }))
    }

    fn of(places: &[Place]) -> Result<Self, AccessError> {
        let at = places.iter().position(|place| place.nats.url.is_some());
        let (servers, in_url) = match at.and_then(|at| places.get(at)) {
            Some(place) => servers(place)?,
            None => (
                vec![server(DEFAULT_URL).map_err(unreachable_default)?.0],
                None,
            ),
        };
        let mut proof = Proof::Nothing;
        for (number, place) in places.iter().enumerate() {
            let in_url = in_url.clone().filter(|_| Some(number) == at);
            if let Some(named) = way(place, in_url)? {
                proof = named;
                break;
            }
        }
        let first = |get: fn(&Nats) -> Option<PathBuf>| places.iter().find_map(|p| get(&p.nats));
        Ok(Self {
            servers,
            proof,
            cert: certificate(places)?,
            ca: first(|nats| nats.ca.clone()),
            tls_first: places.iter().find_map(|p| p.nats.tls_first) == Some(true),
            inbox_prefix: inbox_prefix(places)?,
            patience: patience(places)?,
        })
    }

    /// The client's options that follow from it.
    pub(super) fn options(&self) -> ConnectOptions {
        let options = if self.proof == Proof::Nothing {
            ConnectOptions::new()
        } else {
            let proof = Arc::new(self.proof.clone());
            ConnectOptions::with_auth_callback(move |nonce| show(Arc::clone(&proof), nonce))
        };
        let mut options = options
            .connection_timeout(self.patience)
            // Whoever names certificates wants no server that shows none.
            .require_tls(self.ca.is_some() || self.cert.is_some());
        if let Some(ca) = &self.ca {
            options = options.add_root_certificates(ca.clone());
        }
        if let Some((cert, key)) = &self.cert {
            options = options.add_client_certificate(cert.clone(), key.clone());
        }
        if self.tls_first {
            options = options.tls_first();
        }
        options
    }

    /// What cannot be read just now of what TLS needs: the client has no words for it. Blocks.
    pub(super) fn missing(&self) -> Option<String> {
        let cert = self.cert.iter().flat_map(|(cert, key)| [cert, key]);
        let mut files = self.ca.iter().chain(cert);
        files.find_map(|path| {
            let error = std::fs::File::open(path).err()?;
            Some(format!("cannot read {}: {error}", path.display()))
        })
    }
}

/// As whom, for logs: no secret, and no user name, which may be a token.
impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.proof {
            Proof::Nothing => f.write_str("nobody"),
            Proof::Password { .. } => f.write_str("a user with a password"),
            Proof::Token(_) => f.write_str("whoever has a token"),
            Proof::Creds(path) => write!(f, "the user of {}", path.display()),
            Proof::Nkey(path) => write!(f, "the nkey of {}", path.display()),
            Proof::Jwt { .. } => f.write_str("the user of a JWT"),
        }
    }
}

/// The default is a good address.
fn unreachable_default(problem: String) -> AccessError {
    AccessError::Setting {
        setting: DEFAULT_URL.into(),
        problem,
    }
}

/// The servers of a place, and what their URLs say of a user.
fn servers(place: &Place) -> Result<(Vec<ServerAddr>, Option<Proof>), AccessError> {
    let text = place.nats.url.as_ref().map_or("", |Secret(text)| text);
    let (mut servers, mut proofs) = (Vec::new(), Vec::new());
    for (number, one) in (1..).zip(text.split(',')) {
        let (address, proof) = server(one.trim()).map_err(|problem| {
            let problem = format!(
                "cannot be used: address {number} {problem}; write nats://host:4222, several with commas (a comma in a password is %2C)"
            );
            place.wrong("url", problem)
        })?;
        servers.push(address);
        proofs.extend(proof);
    }
    proofs.dedup();
    match proofs.as_slice() {
        [] => Ok((servers, None)),
        [one] => Ok((servers, Some(one.clone()))),
        [_, _, ..] => Err(place.wrong(
            "url",
            "names different users: all servers are shown the same one",
        )),
    }
}

/// One address without what it says of a user, and that. The error does not repeat the address.
fn server(text: &str) -> Result<(ServerAddr, Option<Proof>), String> {
    let address: ServerAddr = text.parse().map_err(|error: io::Error| {
        let words = error.to_string();
        format!("is none ({words})")
    })?;
    if address.is_websocket() {
        return Err("is of a WebSocket, which is not supported".into());
    }
    if address.host().is_empty() {
        return Err("names no host".into());
    }
    let decoded = |text: &str| {
        let text = String::from_utf8(percent_decode(text));
        text.map(Secret)
            .map_err(|_| "has a user or password that is no UTF-8".to_owned())
    };
    let proof = match (address.username(), address.password()) {
        (None, None) => None,
        (Some(token), None) => Some(Proof::Token(decoded(token)?)),
        (user, Some(password)) => Some(Proof::Password {
            user: decoded(user.unwrap_or_default())?,
            password: decoded(password)?,
        }),
    };
    let mut url = address.into_inner();
    let stripped = url.set_username("").and_then(|()| url.set_password(None));
    let address = stripped.ok().and_then(|()| ServerAddr::from_url(url).ok());
    let address = address.ok_or("has a user in a place that has none")?;
    Ok((address, proof))
}

/// The one way to log in that a place names.
fn way(place: &Place, in_url: Option<Proof>) -> Result<Option<Proof>, AccessError> {
    let nats = &place.nats;
    let mut ways: Vec<(&str, Proof)> = in_url.map(|proof| ("url", proof)).into_iter().collect();
    match (&nats.user, &nats.password) {
        (None, None) => {}
        (Some(user), Some(password)) => {
            let (user, password) = (user.clone(), password.clone());
            ways.push(("user", Proof::Password { user, password }));
        }
        (Some(token), None) => ways.push(("user", Proof::Token(token.clone()))),
        (None, Some(_)) => {
            let problem = format!("wants {} beside it", place.name("user"));
            return Err(place.wrong("password", problem));
        }
    }
    ways.extend(
        nats.token
            .clone()
            .map(|token| ("token", Proof::Token(token))),
    );
    ways.extend(nats.creds.clone().map(|path| ("creds", Proof::Creds(path))));
    ways.extend(nats.nkey.clone().map(|path| ("nkey", Proof::Nkey(path))));
    match (&nats.jwt, &nats.seed) {
        (None, None) => {}
        (Some(jwt), Some(seed)) => {
            let (jwt, seed) = (jwt.clone(), seed.clone());
            ways.push(("jwt", Proof::Jwt { jwt, seed }));
        }
        (Some(_), None) => return Err(place.wrong("jwt", "wants the user's seed beside it")),
        (None, Some(_)) => return Err(place.wrong("seed", "wants the user's JWT beside it")),
    }
    if let [(one, _), (other, _), ..] = ways.as_slice() {
        let problem = format!("and {} are two ways to log in: keep one", place.name(other));
        return Err(place.wrong(one, problem));
    }
    Ok(ways.pop().map(|(_, proof)| proof))
}

fn certificate(places: &[Place]) -> Result<Option<(PathBuf, PathBuf)>, AccessError> {
    for place in places {
        match (&place.nats.cert, &place.nats.key) {
            (None, None) => {}
            (Some(cert), Some(key)) => return Ok(Some((cert.clone(), key.clone()))),
            (Some(_), None) => {
                let problem = format!("wants {} beside it", place.name("key"));
                return Err(place.wrong("cert", problem));
            }
            (None, Some(_)) => {
                let problem = format!("wants {} beside it", place.name("cert"));
                return Err(place.wrong("key", problem));
            }
        }
    }
    Ok(None)
}

fn inbox_prefix(places: &[Place]) -> Result<Option<String>, AccessError> {
    let named = |place: &'_ &Place| place.nats.inbox_prefix.is_some();
    let Some(place) = places.iter().find(named) else {
        return Ok(None);
    };
    let prefix = place.nats.inbox_prefix.clone().unwrap_or_default();
    if prefix.split('.').all(messages::subjects::is_token) {
        return Ok(Some(prefix));
    }
    let problem = format!("is {prefix:?}; write tokens of letters, digits, `-` and `_`, with dots");
    Err(place.wrong("inbox_prefix", problem))
}

fn patience(places: &[Place]) -> Result<Duration, AccessError> {
    let named = |place: &'_ &Place| place.nats.timeout.is_some();
    let Some(place) = places.iter().find(named) else {
        return Ok(PATIENCE);
    };
    let text = place.nats.timeout.as_deref().unwrap_or_default();
    match duration(text) {
        Some(time) if (LEAST_PATIENCE..=MOST_PATIENCE).contains(&time) => Ok(time),
        _ => {
            let problem = format!("is {text:?}; write 100ms to 10m, as 5s or 1m30s");
            Err(place.wrong("timeout", problem))
        }
    }
}

/// A duration as the `nats` command takes it: numbers, each with its unit (Go's `time.ParseDuration`, without signs and
/// the units below a millisecond).
fn duration(text: &str) -> Option<Duration> {
    let (mut rest, mut sum) = (text, Duration::ZERO);
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, after) = rest.split_at_checked(digits)?;
        let end = after.find(|c: char| !c.is_ascii_alphabetic());
        let (unit, after) = after.split_at_checked(end.unwrap_or(after.len()))?;
        let seconds = match unit {
            "ms" => 0.001,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return None,
        };
        let number: f64 = number.parse().ok()?;
        sum = sum.checked_add(Duration::try_from_secs_f64(number * seconds).ok()?)?;
        rest = after;
    }
    Some(sum)
}

/// A context as the `nats` command writes it; what else is in it is not needed here.
#[derive(Deserialize, Default)]
#[serde(default)]
struct Written {
    url: String,
    user: String,
    password: String,
    token: String,
    creds: String,
    nkey: String,
    user_jwt: String,
    user_seed: String,
    cert: String,
    key: String,
    ca: String,
    tls_first: bool,
    inbox_prefix: String,
    nsc: String,
    socks_proxy: String,
}

/// What the chosen context says: that which a place names, or, where no place names a server, that
/// which `nats context select` has chosen.
fn context(
    places: &[&Nats],
    mut is_server_named: bool,
    around: &Surroundings,
) -> Result<Option<Nats>, AccessError> {
    is_server_named |= places.iter().any(|nats| nats.url.is_some());
    let named = places.iter().find_map(|nats| nats.context.clone());
    let selected = || {
        let path = around.settings.as_ref()?.join("context.txt");
        let name = std::fs::read_to_string(path).ok()?.trim().to_owned();
        (!is_server_named && !name.is_empty()).then_some(name)
    };
    let Some(name) = named.or_else(selected) else {
        return Ok(None);
    };
    let path = if Path::new(&name).is_absolute() {
        PathBuf::from(&name)
    } else {
        let wrong = |problem: &str| AccessError::Context {
            path: name.clone().into(),
            problem: problem.into(),
        };
        if name.contains("..") || name.contains('/') {
            return Err(wrong("a name has no `/` and no `..`; a path is absolute"));
        }
        let settings = around.settings.as_ref();
        let settings = settings.ok_or_else(|| {
            wrong("neither XDG_CONFIG_HOME nor HOME is set; write the absolute path of its file")
        })?;
        settings.join("context").join(format!("{name}.json"))
    };
    let read = read_context(&path, around.home.as_deref());
    read.map(Some)
        .map_err(|problem| AccessError::Context { path, problem })
}

fn read_context(path: &Path, home: Option<&Path>) -> Result<Nats, String> {
    let text = std::fs::read_to_string(path).map_err(|error| error.to_string())?;
    // The parser's words may repeat what is in it.
    let written: Written = serde_json::from_str(&text)
        .map_err(|error| format!("line {} is not as the nats command writes it", error.line()))?;
    for (value, setting) in [(&written.nsc, "nsc"), (&written.socks_proxy, "socks_proxy")] {
        if !value.is_empty() {
            return Err(format!("it uses `{setting}`, which is not supported here"));
        }
    }
    let given = |text: String| Some(text).filter(|text| !text.is_empty());
    let secret = |text| given(text).map(Secret);
    let file = |text| {
        let text = given(text)?;
        Some(match (text.strip_prefix("~/"), home) {
            (Some(rest), Some(home)) => home.join(rest),
            _ => PathBuf::from(text),
        })
    };
    Ok(Nats {
        url: secret(written.url),
        user: secret(written.user),
        password: secret(written.password),
        token: secret(written.token),
        creds: file(written.creds),
        nkey: file(written.nkey),
        jwt: secret(written.user_jwt),
        seed: secret(written.user_seed),
        cert: file(written.cert),
        key: file(written.key),
        ca: file(written.ca),
        tls_first: written.tls_first.then_some(true),
        inbox_prefix: given(written.inbox_prefix),
        ..Nats::default()
    })
}

/// What answers the server's challenge `nonce`, with what the files hold now.
async fn show(proof: Arc<Proof>, nonce: Vec<u8>) -> Result<Auth, AuthError> {
    blocking(move || answer(&proof, &nonce))
        .await
        .map_err(AuthError::new)
}

fn answer(proof: &Proof, nonce: &[u8]) -> Result<Auth, String> {
    let mut auth = Auth::new();
    match proof {
        Proof::Nothing => {}
        Proof::Password { user, password } => {
            auth.username = Some(user.0.clone());
            auth.password = Some(password.0.clone());
        }
        Proof::Token(token) => auth.token = Some(token.0.clone()),
        Proof::Creds(path) => {
            let text = read(path)?;
            let mut blocks = blocks(&text);
            let (jwt, seed) = blocks.next().zip(blocks.next()).ok_or_else(|| {
                let path = path.display();
                format!("{path} is no credentials file: it needs a user's JWT and an nkey's seed")
            })?;
            auth.signature = Some(sign(seed, nonce, &path.display().to_string())?.1);
            auth.jwt = Some(jwt.to_owned());
        }
        Proof::Nkey(path) => {
            let text = read(path)?;
            let is_seed = |line: &&str| line.starts_with('S');
            let seed = text.lines().map(str::trim).find(is_seed);
            let (key, signature) =
                sign(seed.unwrap_or_default(), nonce, &path.display().to_string())?;
            auth.nkey = Some(key);
            auth.signature = Some(signature);
        }
        Proof::Jwt { jwt, seed } => {
            auth.signature = Some(sign(&seed.0, nonce, "the seed of the JWT")?.1);
            auth.jwt = Some(jwt.0.clone());
        }
    }
    Ok(auth)
}

fn read(path: &Path) -> Result<String, String> {
    std::fs::read_to_string(path)
        .map_err(|error| format!("cannot read {}: {error}", path.display()))
}

/// The first line of each block between lines of dashes that begin and end one, as in a `.creds` file.
fn blocks(text: &str) -> impl Iterator<Item = &str> {
    let mut lines = text.lines().map(str::trim);
    std::iter::from_fn(move || {
        lines.find(|line| line.starts_with("---") && line.contains("BEGIN"))?;
        lines.next().filter(|line| !line.is_empty())
    })
}

/// The public key of `seed` and its signature of `nonce`.
fn sign(seed: &str, nonce: &[u8], place: &str) -> Result<(String, Vec<u8>), String> {
    let signed =
        KeyPair::from_seed(seed).and_then(|pair| Ok((pair.public_key(), pair.sign(nonce)?)));
    signed.map_err(|_| format!("{place} holds no nkey's seed, which begins with SU"))
}

#[cfg(test)]
#[path = "access_tests.rs"]
mod tests;
