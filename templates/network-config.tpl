# The prebuild's network. Workers get theirs from the agent and never read this.
version: 2
ethernets:
  eth0:
    match:
      macaddress: "{{ mac }}"
    set-name: eth0
    dhcp4: false
    dhcp6: false
    accept-ra: false
    link-local: []
    mtu: {{ mtu }}
    addresses: ["{{ address }}"]
    routes:
      - to: 0.0.0.0/0
        via: {{ gateway }}
    nameservers:
      addresses: [{{ dns }}]
