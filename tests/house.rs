//! The rules of the house, read off the sources: who may use what, where C and `unsafe` may stand, and that the
//! generated header is fresh.

use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn sources(under: &str, extension: &str) -> Vec<(String, String)> {
    fn walk(dir: &Path, extension: &str, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display())) {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, extension, found);
            } else if path.extension().is_some_and(|e| e == extension) {
                found.push(path);
            }
        }
    }
    let mut found = Vec::new();
    let start = root().join(under);
    if start.is_file() {
        found.push(start);
    } else {
        walk(&start, extension, &mut found);
    }
    found
        .into_iter()
        .map(|path| {
            let name = path.strip_prefix(root()).unwrap().display().to_string();
            let text = fs::read_to_string(&path).unwrap();
            (name, text)
        })
        .collect()
}

/// The lines of a source that are code of the product: no comments, nothing from the tests at its end.
fn code(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines()
        .take_while(|line| !line.starts_with("#[cfg(test)]"))
        .enumerate()
        .map(|(i, line)| (i + 1, line))
        .filter(|(_, line)| !line.trim_start().starts_with("//"))
}

/// A panic must not unwind into C.
#[test]
fn every_entry_from_c_is_guarded() {
    let mut entries = 0;
    for (name, text) in sources("src/host", "rs") {
        let lines: Vec<&str> = text.lines().collect();
        for (at, line) in lines.iter().enumerate().filter(|(_, line)| line.contains("extern \"C\" fn ")) {
            // Not the types of C's functions.
            let Some((_, entry)) =
                line.split_once("extern \"C\" fn ").filter(|(_, rest)| !rest.starts_with('(') && !rest.ends_with("{}"))
            else {
                continue;
            };
            let body = lines[at..].iter().take_while(|line| **line != "}");
            assert!(
                body.into_iter().any(|line| line.contains("guard(\"")),
                "{name}:{}: {entry} is not guarded",
                at + 1
            );
            entries += 1;
        }
    }
    assert!(entries > 20);
}

#[test]
fn pure_modules_touch_nothing_outside() {
    let forbidden = [
        "std::fs",
        "std::net",
        "std::os",
        "std::env",
        "std::process",
        "std::thread",
        "std::time",
        "Instant",
        "SystemTime",
        "mio",
        "libc::",
        "crate::host",
        "crate::relay",
        "crate::worker",
        "crate::capture",
    ];
    for module in [
        "src/change.rs",
        "src/wire",
        "src/merge",
        "src/compare",
        "src/peer",
        "src/settings.rs",
        "src/indexlog",
        "src/capture/transaction.rs",
    ] {
        for (name, text) in sources(module, "rs") {
            for (line_number, line) in code(&text) {
                for word in forbidden {
                    assert!(!line.contains(word), "{name}:{line_number}: a pure module uses {word}");
                }
            }
        }
    }
}

#[test]
fn dependencies_run_one_way() {
    let below = [
        (
            "src/wire",
            ["crate::change", "crate::peer", "crate::relay", "crate::capture", "crate::worker", "crate::host"]
                .as_slice(),
        ),
        ("src/change.rs", &["crate::peer", "crate::relay", "crate::capture", "crate::worker", "crate::host"]),
        (
            "src/indexlog",
            &[
                "crate::wire",
                "crate::change",
                "crate::peer",
                "crate::relay",
                "crate::capture",
                "crate::worker",
                "crate::host",
            ],
        ),
        (
            "src/merge",
            &["crate::wire", "crate::peer", "crate::relay", "crate::capture", "crate::worker", "crate::host"],
        ),
        (
            "src/compare",
            &["crate::wire", "crate::peer", "crate::relay", "crate::capture", "crate::worker", "crate::host"],
        ),
        ("src/peer", &["crate::relay", "crate::capture", "crate::worker", "crate::host"]),
        (
            "src/journal",
            &["crate::peer", "crate::relay", "crate::capture", "crate::worker", "crate::host", "crate::wire"],
        ),
        ("src/tls", &["crate::wire", "crate::peer", "crate::relay", "crate::capture", "crate::worker", "crate::host"]),
        ("src/relay", &["crate::capture", "crate::worker", "crate::host"]),
        ("src/capture", &["crate::relay", "crate::worker", "crate::host", "crate::peer", "crate::tls"]),
        ("src/worker", &["crate::relay", "crate::capture", "crate::peer", "crate::journal", "crate::tls"]),
    ];
    for (module, forbidden) in below {
        for (name, text) in sources(module, "rs") {
            for (line_number, line) in code(&text) {
                for word in forbidden {
                    assert!(!line.contains(word), "{name}:{line_number}: {module} must not know {word}");
                }
            }
        }
    }
}

#[test]
fn unsafe_stands_in_host_only() {
    for (name, text) in sources("src", "rs") {
        if name.starts_with("src/host/") || name == "src/bin/dovetail.rs" {
            continue;
        }
        for (line_number, line) in code(&text) {
            let word = line.split(|c: char| !c.is_alphanumeric() && c != '_').any(|word| word == "unsafe");
            assert!(!word, "{name}:{line_number}: unsafe outside of src/host");
        }
    }
}

#[test]
fn the_version_of_dovecot_is_asked_in_one_header() {
    for extension in ["c", "h"] {
        for (name, text) in sources("src/shim", extension) {
            if name == "src/shim/compat.h" {
                continue;
            }
            for (i, line) in text.lines().enumerate() {
                let asks = line.starts_with("#if") && (line.contains("DOVECOT") || line.contains("VERSION"));
                assert!(!asks, "{name}:{}: only compat.h asks for Dovecot's version", i + 1);
            }
        }
    }
}

/// Dovecot 2.4 refuses to start with a setting that the plugin has not told it.
#[test]
fn every_setting_is_told_to_dovecot_and_stands_in_the_readme() {
    let read = |path: &str| std::fs::read_to_string(root().join(path)).unwrap();
    let compat = read("src/shim/compat.h");
    for name in dovetail::settings::NAMES {
        for form in [format!("const char *{name};"), format!("DEF({name})"), format!(".{name} = ")] {
            assert!(compat.contains(&form), "src/shim/compat.h lacks {form}");
        }
        assert!(read("README.md").contains(name), "README.md lacks {name}");
    }
}

#[test]
fn c_stands_in_the_shim_only() {
    for extension in ["c", "h"] {
        for (name, _) in sources("src", extension) {
            assert!(name.starts_with("src/shim/"), "{name}: C code outside of src/shim");
        }
    }
}

/// With `DOVETAIL_WRITE_HEADER` set, writes it anew (`make header`).
#[test]
fn the_c_header_is_fresh() {
    let config = cbindgen::Config::from_file(root().join("cbindgen.toml")).unwrap();
    let builder = cbindgen::Builder::new().with_config(config).with_src(root().join("src/host/mod.rs"));
    let mut bytes = Vec::new();
    builder.generate().expect("cbindgen").write(&mut bytes);
    let fresh = String::from_utf8(bytes).unwrap();
    let path = root().join("include/dovetail.h");
    if std::env::var_os("DOVETAIL_WRITE_HEADER").is_some() {
        fs::write(&path, &fresh).unwrap();
    }
    let checked_in = fs::read_to_string(&path).unwrap_or_default();
    assert!(checked_in == fresh, "include/dovetail.h is not what src/host says: run `make header`");
}

/// On Debian 13 with its own Rust, nothing can be built for Debian 12.
#[test]
fn a_release_that_the_matrix_cannot_test_is_no_success() {
    use std::os::unix::fs::PermissionsExt;
    let stubs = std::env::temp_dir().join(format!("dovetail-matrix-{}", std::process::id()));
    fs::create_dir_all(&stubs).unwrap();
    for (name, says) in [("rustc", "/usr"), ("cargo", "")] {
        fs::write(stubs.join(name), format!("#!/bin/sh\necho {says}\n")).unwrap();
        fs::set_permissions(stubs.join(name), fs::Permissions::from_mode(0o755)).unwrap();
    }
    let matrix = std::process::Command::new(root().join("tests/matrix.sh"))
        .env("PATH", format!("{}:{}", stubs.display(), std::env::var("PATH").unwrap()))
        .env("DOVETAIL_MATRIX_NAMESPACE", "1")
        .env("DOVETAIL_MATRIX_HERE", "trixie")
        .output();
    fs::remove_dir_all(&stubs).unwrap();
    let matrix = matrix.unwrap();
    let (out, error) = (String::from_utf8_lossy(&matrix.stdout), String::from_utf8_lossy(&matrix.stderr));
    assert_eq!(matrix.status.code(), Some(77), "{out}{error}");
    assert!(out.contains("bookworm: SKIPPED") && error.contains("NOT COMPLETE"), "{out}{error}");
}
