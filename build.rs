//! Compiles the protocol and, with the feature `host`, the C shim against the installed Dovecot's headers.

use std::path::PathBuf;
use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=src/wire/dovetail.proto");
    let files = protox::compile(["src/wire/dovetail.proto"], ["src/wire"]).expect("dovetail.proto");
    prost_build::Config::new().compile_fds(files).expect("prost");

    // What `dovecot-config` says of the installed Dovecot; the executable needs it to find the library.
    println!("cargo:rerun-if-env-changed=DOVECOT_CONFIG");
    let dovecot = DovecotConfig::read();
    println!("cargo:rustc-env=DOVETAIL_MODULEDIR={}", dovecot.moduledir);

    if std::env::var_os("CARGO_FEATURE_HOST").is_some() {
        build_shim(&dovecot);
    }
}

const SANITIZERS: &str = "-fsanitize=address,undefined";

/// The values of Dovecot's `dovecot-config`, a shell fragment that dovecot-dev installs.
struct DovecotConfig {
    include: String,
    pkglibdir: String,
    moduledir: String,
}

impl DovecotConfig {
    fn read() -> DovecotConfig {
        let path = std::env::var("DOVECOT_CONFIG").unwrap_or("/usr/lib/dovecot/dovecot-config".into());
        let script = format!(
            ". {path} 2>/dev/null; printf '%s\\n' \"$dovecot_pkgincludedir\" \"$dovecot_pkglibdir\" \"$dovecot_moduledir\""
        );
        let output = Command::new("sh").args(["-c", &script]).output().expect("sh");
        let text = String::from_utf8(output.stdout).expect("dovecot-config is UTF-8");
        let mut lines = text.lines().map(str::to_owned);
        let mut next = |default: &str| lines.next().filter(|l| !l.is_empty()).unwrap_or(default.into());
        DovecotConfig {
            include: next("/usr/include/dovecot"),
            pkglibdir: next("/usr/lib/dovecot"),
            moduledir: next("/usr/lib/dovecot/modules"),
        }
    }
}

fn build_shim(dovecot: &DovecotConfig) {
    println!("cargo:rerun-if-changed=src/shim");
    println!("cargo:rerun-if-changed=include");
    assert!(
        PathBuf::from(&dovecot.include).join("lib.h").exists(),
        "Dovecot's headers are missing: apt-get install dovecot-dev, or point DOVECOT_CONFIG to its dovecot-config"
    );
    let mut sources: Vec<PathBuf> = std::fs::read_dir("src/shim")
        .expect("src/shim")
        .map(|entry| entry.expect("src/shim").path())
        .filter(|path| path.extension().is_some_and(|e| e == "c"))
        .collect();
    sources.sort();
    let mut build = cc::Build::new();
    if std::env::var_os("CARGO_FEATURE_SANITIZERS").is_some() {
        build.flag(SANITIZERS).flag("-fno-omit-frame-pointer").flag("-fno-sanitize-recover=undefined");
        println!("cargo:rustc-cdylib-link-arg=-lasan");
        println!("cargo:rustc-cdylib-link-arg=-lubsan");
    }
    build
        .files(&sources)
        .include("include")
        .include(&dovecot.include)
        .define("HAVE_CONFIG_H", None)
        .std("gnu11")
        .flag("-fvisibility=hidden")
        .flag("-Wno-unused-parameter")
        .flag_if_supported("-Wno-clobbered")
        .warnings_into_errors(std::env::var_os("CI").is_some())
        .compile("dovetail_shim");
    // The loader resolves Dovecot's symbols from the process; the libraries are named so that the executable finds them.
    println!("cargo:rustc-cdylib-link-arg=-Wl,--no-as-needed");
    println!("cargo:rustc-cdylib-link-arg=-L{}", dovecot.pkglibdir);
    println!("cargo:rustc-cdylib-link-arg=-ldovecot-storage");
    println!("cargo:rustc-cdylib-link-arg=-ldovecot");
    println!("cargo:rustc-cdylib-link-arg=-Wl,-rpath,{}", dovecot.pkglibdir);
    // Our thread may still run when Dovecot calls dlclose(): stay mapped.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
}
