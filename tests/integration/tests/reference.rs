//! The harness against plugins that are known to work: if this fails, the harness is broken, not our plugins.

use integration::cnitool::CniTool;
use integration::host::Host;
use integration::plugin::Call;
use integration::tools;
use serde_json::json;

fn conflist() -> serde_json::Value {
    json!({"cniVersion": "1.0.0", "name": "ref", "plugins": [
        {"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": false,
         "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.244.1.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
        {"type": "portmap", "capabilities": {"portMappings": true}}]})
}

#[test]
fn cnitool_drives_the_reference_plugins_in_a_host() {
    let host = Host::new("edge1").unwrap();
    let reference = tools::cni_plugins_dir().unwrap();
    let cni = CniTool::with_path(&host, &conflist(), &reference.to_string_lossy()).unwrap();

    let a = cni.pod("default", "a").unwrap().with_capabilities(
        json!({"portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]}),
    );
    let b = cni.pod("default", "b").unwrap();
    let (address_a, address_b) =
        (cni.add(&a).unwrap().address().unwrap(), cni.add(&b).unwrap().address().unwrap());
    assert_eq!((address_a.as_str(), address_b.as_str()), ("10.244.1.2", "10.244.1.3"));
    host.sh(&format!("ping -c1 -W2 {address_a}")).unwrap();
    host.sh_in(&b.netns, &format!("ping -c1 -W2 {address_a}")).unwrap();
    cni.check(&a).unwrap();
    cni.del(&a).unwrap();
    host.sh(&format!("! ping -c1 -W1 {address_a}")).unwrap();
    let error = cni.check(&a).unwrap_err().to_string();
    assert!(error.contains("cnitool"), "{error}");
}

#[test]
fn a_single_plugin_is_called_with_nothing_but_what_was_said() {
    let host = Host::new("edge1").unwrap();
    let dir = tools::cni_plugins_dir().unwrap();
    let config = json!({"cniVersion": "1.0.0", "name": "n", "type": "bridge",
        "ipam": {"type": "host-local", "subnet": "10.1.0.0/24"}});
    let call = Call::new(&host, dir.join("host-local"), "ADD").path(&[&dir]).config(&config);

    let answer = call.clone().attachment("c1", "eth0", "none").run().unwrap();
    assert_eq!(answer.result().unwrap()["ips"][0]["address"], "10.1.0.2/24");

    let answer = call.run().unwrap();
    assert_eq!(answer.error_code().unwrap(), 4, "required variables are missing: {:?}", answer.output);
}
