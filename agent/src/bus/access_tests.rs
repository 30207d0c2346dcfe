use super::{Access, AccessError, Proof, Surroundings, answer};
use crate::config::{Nats, Secret};
use std::path::PathBuf;
use std::time::Duration;

fn secret(text: &str) -> Option<Secret> {
    Some(Secret(text.into()))
}

fn environment(variables: &[(&str, &str)]) -> Surroundings {
    Surroundings::of(|name| {
        let found = variables.iter().find(|(known, _)| *known == name);
        found.map(|(_, value)| (*value).to_owned())
    })
}

fn password(user: &str, password: &str) -> Proof {
    let (user, password) = (Secret(user.into()), Secret(password.into()));
    Proof::Password { user, password }
}

fn urls(access: &Access) -> Vec<&str> {
    let urls = access.servers.iter();
    urls.map(async_nats::ServerAddr::as_url_str).collect()
}

#[test]
fn users_and_passwords_leave_the_urls() {
    let file = Nats {
        url: secret("nats://me:p%40w@a:1, tls://b ,me:p%40w@c:3"),
        ..Nats::default()
    };
    let access = Access::gather(&file, Surroundings::default()).unwrap();
    assert_eq!(urls(&access), ["nats://a:1", "tls://b", "nats://c:3"]);
    assert_eq!(access.proof, password("me", "p@w"));
    assert!(!format!("{access:?} {access}").contains("p@w"));
    let file = Nats {
        url: secret("t0ken@a"),
        ..Nats::default()
    };
    let access = Access::gather(&file, Surroundings::default()).unwrap();
    assert_eq!(access.proof, Proof::Token(Secret("t0ken".into())));
}

#[test]
fn the_first_place_that_names_a_way_to_log_in_is_asked_for_all_of_it() {
    let file = Nats {
        url: secret("nats://file:pw@file"),
        creds: None,
        ca: Some("/file.pem".into()),
        ..Nats::default()
    };
    let plain = Access::gather(&file, Surroundings::default()).unwrap();
    assert_eq!(
        (urls(&plain), &plain.proof),
        (vec!["nats://file"], &password("file", "pw"))
    );
    let around = environment(&[("NATS_USER", "me"), ("NATS_PASSWORD", "x"), ("NATS_CA", "")]);
    let access = Access::gather(&file, around).unwrap();
    assert_eq!(
        (urls(&access), &access.proof),
        (vec!["nats://file"], &password("me", "x"))
    );
    assert_eq!(access.ca, Some("/file.pem".into()));
    // The user in a URL that is not used is nobody.
    let around = environment(&[("NATS_URL", "nats://env"), ("NATS_TIMEOUT", "1500ms")]);
    let access = Access::gather(&file, around).unwrap();
    assert_eq!(
        (urls(&access), &access.proof),
        (vec!["nats://env"], &Proof::Nothing)
    );
    assert_eq!(access.patience, Duration::from_millis(1500));
    for (text, seconds) in [
        ("1m30s", 90.0),
        ("2.5s", 2.5),
        ("1s500ms", 1.5),
        ("10m", 600.0),
    ] {
        let around = environment(&[("NATS_TIMEOUT", text)]);
        let access = Access::gather(&file, around).unwrap();
        assert_eq!(access.patience, Duration::from_secs_f64(seconds), "{text}");
    }
    let flagged = Nats {
        flag: secret("flag:1"),
        ..file
    };
    let access = Access::gather(&flagged, environment(&[("NATS_NKEY", "/nk")])).unwrap();
    assert_eq!(
        (urls(&access), &access.proof),
        (vec!["nats://flag:1"], &Proof::Nkey("/nk".into()))
    );
}

#[test]
fn each_mistake_is_named_and_no_secret_shown() {
    for (variables, words) in [
        (
            &[("NATS_URL", "nats://me:s3cret@h:port")][..],
            "NATS_URL cannot be used: address 1",
        ),
        (
            &[("NATS_URL", "nats://me:s3cret,x@h")],
            "a comma in a password is %2C",
        ),
        (
            &[("NATS_URL", "nats://a:s3cret@h,nats://b:s3cret@i")],
            "different users",
        ),
        (&[("NATS_URL", "ws://me:s3cret@h")], "WebSocket"),
        (&[("NATS_URL", "http://me:s3cret@h")], "invalid scheme"),
        (&[("NATS_URL", "nats://me:s3cret@")], "NATS_URL"),
        (
            &[("NATS_URL", "u:s3cret@h"), ("NATS_TOKEN", "s3cret")],
            "NATS_URL and NATS_TOKEN are two",
        ),
        (
            &[("NATS_PASSWORD", "s3cret")],
            "NATS_PASSWORD wants NATS_USER",
        ),
        (&[("NATS_SEED", "s3cret")], "NATS_SEED wants the user's JWT"),
        (&[("NATS_JWT", "s3cret")], "NATS_JWT wants"),
        (&[("NATS_CERT", "/c")], "NATS_CERT wants NATS_KEY"),
        (&[("NATS_TIMEOUT", "5")], "NATS_TIMEOUT is \"5\""),
        (&[("NATS_TIMEOUT", "5 s")], "NATS_TIMEOUT is \"5 s\""),
        (&[("NATS_TIMEOUT", "1d")], "NATS_TIMEOUT is \"1d\""),
        (&[("NATS_TIMEOUT", "11m")], "write 100ms to 10m"),
        (&[("NATS_CONTEXT", "../x")], "a path is absolute"),
        (&[("NATS_CONTEXT", "x")], "XDG_CONFIG_HOME"),
        (
            &[("NATS_CONTEXT", "/does/not/exist.json")],
            "/does/not/exist.json",
        ),
    ] {
        let error = Access::gather(&Nats::default(), environment(variables));
        let error = error.map_err(|error| error.to_string()).unwrap_err();
        assert!(error.contains(words), "{variables:?} gave {error:?}");
        assert!(!error.contains("s3cret"), "{error}");
    }
    let file = Nats {
        inbox_prefix: Some("a.*".into()),
        ..Nats::default()
    };
    let error = Access::gather(&file, Surroundings::default()).unwrap_err();
    assert!(error.to_string().contains("nats.inbox_prefix"), "{error}");
}

#[test]
fn a_context_is_read_as_the_nats_command_writes_it() {
    let home = std::env::temp_dir().join(format!("ostler-context-{}", std::process::id()));
    let contexts = home.join(".config/nats/context");
    std::fs::create_dir_all(&contexts).unwrap();
    let write = |name: &str, text: &str| std::fs::write(contexts.join(name), text).unwrap();
    write(
        "prod.json",
        r#"{"description":"x","url":"nats://p1,nats://p2","socks_proxy":"","token":"","user":"","password":"",
            "creds":"~/prod.creds","nkey":"","cert":"/c","key":"/k","ca":"/ca","nsc":"","jetstream_domain":"",
            "inbox_prefix":"_INBOX_p","user_jwt":"","color_scheme":"","tls_first":true}"#,
    );
    write("nsc.json", r#"{"nsc":"nsc://o/a/u"}"#);
    write("broken.json", "{\"user\":\"u\",\n\"password\":s3cret}");
    std::fs::write(home.join(".config/nats/context.txt"), "prod\n").unwrap();
    let home_text = home.display().to_string();
    let gather = |file: &Nats, more: &[(&str, &str)]| -> Result<Access, AccessError> {
        let all = [&[("HOME", home_text.as_str())], more].concat();
        Access::gather(file, environment(&all))
    };
    let chosen = gather(&Nats::default(), &[]).unwrap();
    let named = gather(&Nats::default(), &[("NATS_CONTEXT", "prod")]).unwrap();
    assert_eq!(chosen, named);
    assert_eq!(urls(&named), ["nats://p1", "nats://p2"]);
    assert_eq!(named.proof, Proof::Creds(home.join("prod.creds")));
    assert_eq!(named.cert, Some((PathBuf::from("/c"), PathBuf::from("/k"))));
    assert_eq!((named.ca, named.tls_first), (Some("/ca".into()), true));
    assert_eq!(named.inbox_prefix.as_deref(), Some("_INBOX_p"));
    let file = Nats {
        url: secret("nats://file"),
        ..Nats::default()
    };
    let unasked = gather(&file, &[]).unwrap();
    assert_eq!(
        unasked.proof,
        Proof::Nothing,
        "a selected context is the last resort"
    );
    let path = contexts.join("prod.json").display().to_string();
    let both = gather(&file, &[("NATS_CONTEXT", &path)]).unwrap();
    assert_eq!(
        (urls(&both), &both.proof),
        (vec!["nats://file"], &named.proof)
    );
    for (name, words) in [
        ("nsc", "`nsc`"),
        ("broken", "line 2"),
        ("none", "none.json"),
    ] {
        let error = gather(&file, &[("NATS_CONTEXT", name)])
            .unwrap_err()
            .to_string();
        assert!(
            error.contains(words) && !error.contains("s3cret"),
            "{error}"
        );
    }
    std::fs::remove_dir_all(home).unwrap();
}

#[test]
fn files_are_read_when_the_server_asks() {
    let path = std::env::temp_dir().join(format!("ostler-access-{}", std::process::id()));
    let creds = Proof::Creds(path.clone());
    let error = answer(&creds, b"nonce").map(drop).unwrap_err();
    assert!(error.contains(path.to_str().unwrap()), "{error}");
    for pair in [nkeys::KeyPair::new_user(), nkeys::KeyPair::new_user()] {
        let seed = pair.seed().unwrap();
        std::fs::write(
            &path,
            format!(
                "-----BEGIN NATS USER JWT-----\r\na.b.c\r\n------END NATS USER JWT------\r\n\r\n*** IMPORTANT ***\r\n\
                 -----BEGIN USER NKEY SEED-----\r\n{seed}\r\n------END USER NKEY SEED------\r\n"
            ),
        )
        .unwrap();
        let auth = answer(&creds, b"nonce").unwrap();
        assert_eq!(auth.jwt.as_deref(), Some("a.b.c"));
        pair.verify(b"nonce", &auth.signature.unwrap()).unwrap();
        std::fs::write(&path, format!("# a comment\n{seed}\n")).unwrap();
        let auth = answer(&Proof::Nkey(path.clone()), b"nonce").unwrap();
        assert_eq!(auth.nkey, Some(pair.public_key()));
    }
    for text in ["", "-----BEGIN NATS USER JWT-----\na.b.c\n", "s3cret"] {
        std::fs::write(&path, text).unwrap();
        for proof in [&creds, &Proof::Nkey(path.clone())] {
            let error = answer(proof, b"nonce").map(drop).unwrap_err();
            assert!(
                error.contains(path.to_str().unwrap()) && !error.contains("s3cret"),
                "{error}"
            );
        }
    }
    std::fs::remove_file(&path).unwrap();
}
