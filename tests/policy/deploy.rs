//! The manifest that is shipped: it parses, starts what there is, with the rights that are needed and no more.

use std::{path::Path, process::Command};

use clap::{CommandFactory, Parser};
use lab::{daemon::binary, process::output};
use nodeguard::cli::args::{Cli, Command as Sub};
use serde_json::Value;

/// The documents of a manifest.
fn documents(file: &str) -> Vec<Value> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy").join(file);
    serde_saphyr::from_multiple(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn kind(kind: &str) -> Value {
    documents("daemonset.yaml").into_iter().find(|document| document["kind"] == kind).unwrap()
}

fn strings(value: &Value) -> Vec<&str> {
    value.as_array().unwrap().iter().map(|text| text.as_str().unwrap()).collect()
}

#[test]
fn the_command_line_is_one_that_this_binary_takes() {
    let daemon = kind("DaemonSet");
    let container = &daemon["spec"]["template"]["spec"]["containers"][0];
    let words = [strings(&container["command"]), strings(&container["args"])].concat();
    let Sub::Run(args) = Cli::try_parse_from(&words).unwrap_or_else(|error| panic!("{error}")).command else {
        panic!("not run: {words:?}")
    };
    // What it reads and writes is mounted, and nothing else is writable.
    let mounts = container["volumeMounts"].as_array().unwrap();
    let mount = |path: &Path| {
        let inside = |mount: &&Value| path.starts_with(mount["mountPath"].as_str().unwrap());
        mounts.iter().find(inside).unwrap_or_else(|| panic!("{} is not mounted", path.display()))
    };
    for read in [&args.policy, &args.half.agent.ca_cert, &args.half.agent.service_account_token_path] {
        assert_eq!(mount(read)["readOnly"], true, "{}", read.display());
    }
    for written in [&args.admin_socket, &args.bpffs] {
        assert!(mount(written)["readOnly"].is_null(), "{}", written.display());
    }
    assert_eq!(mount(Path::new("/sys/fs/cgroup"))["readOnly"], true);
    let volumes = daemon["spec"]["template"]["spec"]["volumes"].as_array().unwrap();
    for mount in mounts {
        assert!(volumes.iter().any(|volume| volume["name"] == mount["name"]), "{mount}");
        assert!(mount["subPath"].is_null(), "a subPath is never updated: {mount}");
    }
    assert_eq!(mounts.len(), volumes.len());
    // The probes ask the port that is served, and the pod has longer to end than the drain takes.
    for probe in ["startupProbe", "livenessProbe", "readinessProbe"] {
        let get = &container[probe]["httpGet"];
        assert_eq!(get["port"], args.half.agent.health_server_port, "{probe}");
        assert_eq!(get["host"], args.half.agent.health_server_host.as_str(), "{probe}");
        assert_eq!(get["path"], if probe == "readinessProbe" { "/readyz" } else { "/healthz" });
    }
    let grace = daemon["spec"]["template"]["spec"]["terminationGracePeriodSeconds"].as_u64().unwrap();
    assert!(grace > args.half.drain_timeout.as_secs() + 5, "{grace}");
}

#[test]
fn watching_services_takes_two_rights_a_flag_and_a_token() {
    let [role, binding] = &documents("services.yaml")[..] else { panic!("not a role and its binding") };
    let rules = role["rules"].as_array().unwrap();
    let granted: Vec<_> = rules
        .iter()
        .map(|rule| (strings(&rule["apiGroups"]), strings(&rule["resources"]), strings(&rule["verbs"])))
        .collect();
    let wanted = [("", "services"), ("discovery.k8s.io", "endpointslices")];
    assert_eq!(granted, wanted.map(|(group, kind)| (vec![group], vec![kind], vec!["list", "watch"])));
    assert_eq!((&binding["roleRef"]["name"], &binding["roleRef"]["kind"]), (&role["metadata"]["name"], &role["kind"]));
    let account = kind("ServiceAccount");
    let subject = &binding["subjects"][0];
    assert_eq!(
        (&subject["name"], &subject["namespace"]),
        (&account["metadata"]["name"], &account["metadata"]["namespace"])
    );

    // The patch only adds to lists that are merged by a key, so that it can be applied again.
    let patch = documents("services-patch.yaml").remove(0);
    let pod = &patch["spec"]["template"]["spec"];
    let keys = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    assert_eq!(keys(pod), ["containers", "volumes"]);
    let container = &pod["containers"][0];
    assert_eq!(keys(container), ["env", "name", "volumeMounts"]);
    let daemon = kind("DaemonSet");
    assert_eq!(container["name"], daemon["spec"]["template"]["spec"]["containers"][0]["name"]);
    let variable = &container["env"][0];
    for name in ["run", "agent"] {
        let mut command = Cli::command();
        let arguments = command.find_subcommand_mut(name).unwrap().get_arguments();
        let flag = arguments.into_iter().find(|argument| argument.get_long() == Some("watch-services")).unwrap();
        assert_eq!(flag.get_env().unwrap(), variable["name"].as_str().unwrap());
    }
    assert_eq!(variable["value"], "true");
    let mounts = container["volumeMounts"].as_array().unwrap();
    let api =
        mounts.iter().find(|mount| mount["mountPath"] == "/var/run/secrets/kubernetes.io/serviceaccount").unwrap();
    assert_eq!(api["readOnly"], true);
    let volume = pod["volumes"].as_array().unwrap().iter().find(|volume| volume["name"] == api["name"]).unwrap();
    let sources = volume["projected"]["sources"].as_array().unwrap();
    assert_eq!(sources[0]["serviceAccountToken"]["path"], "token");
    assert!(sources[0]["serviceAccountToken"]["audience"].is_null(), "a token for the API server itself");
    assert_eq!(sources[1]["configMap"]["items"][0]["path"], "ca.crt");
}

#[test]
fn it_has_the_rights_that_are_needed_and_no_more() {
    let daemon = kind("DaemonSet");
    let pod = &daemon["spec"]["template"]["spec"];
    assert_eq!((&pod["hostNetwork"], &pod["hostPID"]), (&Value::Bool(true), &Value::Bool(true)));
    let security = &pod["containers"][0]["securityContext"];
    assert_eq!(strings(&security["capabilities"]["drop"]), ["ALL"]);
    assert_eq!(strings(&security["capabilities"]["add"]), ["BPF", "NET_ADMIN", "PERFMON"]);
    let bool = |name: &str| security[name].as_bool();
    assert_eq!(bool("readOnlyRootFilesystem"), Some(true));
    assert_eq!((bool("privileged"), bool("allowPrivilegeEscalation")), (Some(false), Some(false)));
    assert_eq!(security["seccompProfile"]["type"], "RuntimeDefault");
    // No token of the API server's: the one that it has is for the proxy-server alone.
    let token =
        &pod["volumes"].as_array().unwrap().iter().find(|volume| volume["name"] == "identity").unwrap()["projected"];
    let token = &token["sources"][0]["serviceAccountToken"];
    assert_eq!(token["audience"], "system:konnectivity-server");
    assert_eq!(pod["automountServiceAccountToken"], false);
    assert_eq!(daemon["spec"]["selector"]["matchLabels"], daemon["spec"]["template"]["metadata"]["labels"]);
}

#[test]
fn its_policy_is_good() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("policy.yaml");
    std::fs::write(&path, kind("ConfigMap")["data"]["policy.yaml"].as_str().unwrap()).unwrap();
    let mut command = Command::new(binary().unwrap());
    command.arg("check").arg(&path);
    let said = output(&mut command).unwrap();
    let text = said.text();
    assert!(said.code == 0 && text.contains("is valid, 0 warnings"), "{text}");
}
