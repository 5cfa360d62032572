# One process's rules, applied in one transaction. Policy accept everywhere: nothing
# here concerns traffic that does not come from or go to our TAPs (set @taps).
table inet {{table}} {
	set taps {
		type ifname
	}
	# What machines never reach unless the config allows it: private and special ranges,
	# and the networks this host is connected to.
	set private {
		type ipv4_addr
		flags interval
		auto-merge
		elements = { {{private}} }
	}
	# Answers about the host or its cloud account; allow_private does not open them.
	set metadata {
		type ipv4_addr
		flags interval
		elements = { 169.254.0.0/16, 100.100.100.200 }
	}

	chain input {
		type filter hook input priority filter; policy accept;
		iifname @taps jump to_host
	}
	chain to_host {
		ct state established,related accept
		icmp type echo-request limit rate 20/second accept
		{{allow_host}}
		counter drop
	}

	chain forward {
		type filter hook forward priority filter; policy accept;
		iifname @taps tcp flags & (syn|rst) == syn tcp option maxseg size set rt mtu
		oifname @taps tcp flags & (syn|rst) == syn tcp option maxseg size set rt mtu
		iifname @taps jump from_guest
		oifname @taps jump to_guest
	}
	chain from_guest {
		oifname "fleetingd*" counter drop
		ct state established,related jump dropnottap
		ip daddr @metadata counter drop
		{{allow_private}}
		ip daddr @private jump refuse_private
		meta nfproto ipv6 counter drop
		jump dropnottap
	}
	chain to_guest {
		ct state established,related accept
		counter drop
	}
	chain refuse_private {
		limit rate 6/minute log prefix "fleetingd private (see allow_private): "
		counter drop
	}
	# Counts what each machine sends out; one rule a TAP, kept until the process ends.
	chain dropnottap {
	}

	chain postrouting {
		type nat hook postrouting priority srcnat; policy accept;
		ip saddr {{subnet}} oifname != "fleetingd*" masquerade
	}
}
table netdev {{table}} {
}
