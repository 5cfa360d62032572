#cloud-config
# Makes a vendor's cloud image into one whose machines boot at once: run once, in the prebuild.
#
# cloud-init grows the disk and makes the distribution's user; the rest is the script below, which
# runs when cloud-init is done. Whatever becomes of it, the machine powers off, and success is
# what /var/lib/fleetingd/prebuild.json says.
growpart:
  mode: auto
  devices: ["/"]
resize_rootfs: true
ssh_genkeytypes: [ed25519]
disable_root: false
write_files:
  - path: /run/systemd/system/fleetingd-prebuild.service
    content: |
      [Unit]
      Description=Prebuild of fleetingd
      After=cloud-final.service multi-user.target
      SuccessAction=poweroff
      FailureAction=poweroff
      [Service]
      Type=oneshot
      ExecStart=/bin/sh /run/fleetingd/prebuild.sh
      StandardInput=null
      StandardOutput=journal+console
      StandardError=journal+console
      TimeoutStartSec=infinity
  - path: /run/fleetingd/prebuild.sh
    content: |
      #!/bin/sh
      # Packages, units and the like are optional: they warn. `fail` is for what a machine needs.
      set -u
      export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
      export HOME=/root DEBIAN_FRONTEND=noninteractive NEEDRESTART_MODE=l
      user={{ username }}
      seed=/run/fleetingd/seed
      results=/run/fleetingd/results
      state=/var/lib/fleetingd
      warnings=
      offline=no

      say() {
          echo "[fleetingd: $*]"
      }

      # Takes plain words only: they go into JSON as they are.
      warn() {
          say "warning: $*"
          warnings="$warnings${warnings:+, }\"$*\""
      }

      report() {
          codes= n=0
          while [ "$n" -lt {{ commands }} ]; do
              n=$((n + 1))
              code=$(cat "$results/code-$n" 2>/dev/null)
              codes="$codes${codes:+, }${code:-null}"
          done
          printf '{"version": 1, "success": %s, "reason": "%s", "commands": [%s], "warnings": [%s]}\n' \
              "$1" "$2" "$codes" "$warnings" >"$state/prebuild.json.new"
          mv "$state/prebuild.json.new" "$state/prebuild.json"
          sync
      }

      fail() {
          say "failed: $*"
          report false "$*"
          exit 1
      }

      # usage: apt_get SECONDS ARGUMENTS...
      apt_get() {
          limit=$1
          shift
          timeout "$limit" apt-get -y -o DPkg::Lock::Timeout=120 -o APT::Update::Error-Mode=any \
              -o Acquire::Retries=2 -o Acquire::http::Timeout=20 -o Acquire::https::Timeout=20 \
              -o Dpkg::Options::=--force-confdef -o Dpkg::Options::=--force-confold "$@" </dev/null
      }

      # What runs by itself, on a machine that lives for one job, only gets in its way. Masked, not
      # disabled: presets and package scripts enable again. Before the operator's commands, so
      # that these can unmask what they want.
      mask_noise() {
          wanted='apt-daily.timer apt-daily.service apt-daily-upgrade.timer
              apt-daily-upgrade.service unattended-upgrades.service apt-news.service
              esm-cache.service ua-timer.timer ua-reboot-cmds.service ubuntu-advantage.service
              update-notifier-download.timer update-notifier-motd.timer motd-news.timer
              man-db.timer dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service
              fstrim.timer fwupd.service fwupd-refresh.timer ModemManager.service
              udisks2.service multipathd.service multipathd.socket snapd.service snapd.socket
              snapd.seeded.service snapd.snap-repair.timer pollinate.service apport.service
              apport-autoreport.timer sshd-keygen.service systemd-networkd-wait-online.service
              NetworkManager-wait-online.service ifupdown-wait-online.service'
          units=
          for unit in $wanted; do
              for place in /etc/systemd/system /usr/lib/systemd/system /lib/systemd/system; do
                  if [ -e "$place/$unit" ]; then
                      units="$units $unit"
                      break
                  fi
              done
          done
          # shellcheck disable=SC2086
          [ -z "$units" ] || timeout 120 systemctl mask --now $units
      }

      # Without a network apt waits for minutes; a proxy resolves names for us.
      mirror_is_known() {
          proxy=$(apt-config dump --format '%v' Acquire::http::Proxy Acquire::https::Proxy)
          host=$(apt-get --print-uris update | sed -n "1s,^'https*://\([^/:']*\).*,\1,p")
          [ -n "$proxy" ] || [ -z "$host" ] || timeout 30 getent ahosts "$host" >/dev/null
      }

      packages() {
          if ! command -v apt-get >/dev/null; then
              warn 'no apt-get: no packages were installed'
              return
          fi
          if mirror_is_known && apt_get 300 update; then
              apt_get 1800 upgrade --with-new-pkgs || warn 'the package upgrade failed'
              apt_get 600 install --no-install-recommends git curl ca-certificates sudo
          else
              offline=yes
              warn 'the package lists could not be fetched: nothing was upgraded'
          fi
          for tool in git curl sudo; do
              command -v "$tool" >/dev/null || warn "$tool is missing"
          done
      }

      # An existing user keeps what it has.
      set_up_login() {
          if ! id -u "$user" >/dev/null 2>&1; then
              group=
              ! getent group "$user" >/dev/null || group="-g $user"
              # shellcheck disable=SC2086
              useradd --create-home --shell /bin/bash $group "$user" || return 1
              # No password, and not locked either: sshd refuses keys of locked users.
              usermod --password '*' "$user"
              mkdir -p /etc/sudoers.d
              echo "$user ALL=(ALL:ALL) NOPASSWD:ALL" >/etc/sudoers.d/90-fleetingd
              chmod 0440 /etc/sudoers.d/90-fleetingd
          fi
          [ ! -f "$seed/password" ] || chpasswd <"$seed/password"
      }

      install_agent() {
          install -D -m 0755 "$seed/fleetingd" /usr/local/lib/fleetingd/fleetingd &&
              install -m 0644 "$seed/fleetingd-agent.service" /etc/systemd/system/ &&
              systemctl --no-reload enable fleetingd-agent.service
      }

      set_up_sshd() {
          [ -x /usr/sbin/sshd ] || apt_get 600 install openssh-server
          install -D -m 0644 "$seed/sshd.conf" /etc/ssh/sshd_config.d/00-fleetingd.conf || return 1
          grep -qi '^[[:space:]]*include.*/sshd_config\.d' /etc/ssh/sshd_config ||
              sed -i '1i Include /etc/ssh/sshd_config.d/*.conf' /etc/ssh/sshd_config
          mkdir -p /run/sshd
          /usr/sbin/sshd -t
      }

      runner_package() (
          [ $offline = no ] || exit 1
          . /etc/os-release
          key=/usr/share/keyrings/gitlab-runner.asc
          list=/etc/apt/sources.list.d/gitlab-runner.list
          url=https://packages.gitlab.com/runner/gitlab-runner
          curl -fsSL --retry 2 --max-time 60 -o "$key" "$url/gpgkey" || exit 1
          echo "deb [signed-by=$key] $url/$ID $VERSION_CODENAME main" >"$list"
          if apt_get 300 update && apt_get 600 install gitlab-runner; then
              # Jobs call it; nothing is to run by itself.
              systemctl disable --now gitlab-runner.service
              exit 0
          fi
          rm -f "$key" "$list"
          exit 1
      )

      operator_commands() {
          /bin/sh "$seed/prebuild-commands.sh" "$seed" "$results" {{ commands }} {{ on_error }} \
              </dev/null
          status=$?
          # A command that ended the shell (exit, exec, set -e) has that exit for its code.
          current=$(cat "$results/current" 2>/dev/null)
          [ -z "$current" ] || [ -e "$results/code-$current" ] ||
              echo "$status" >"$results/code-$current"
          for code in "$results"/code-*; do
              [ -e "$code" ] || continue
              [ {{ on_error }} = continue ] || [ "$(cat "$code")" = 0 ] || return 1
          done
      }

      # The card of a worker belongs to the agent, and so does the start of sshd.
      leave_to_agent() {
          rm -rf /etc/netplan/* /run/netplan
          rm -f /etc/systemd/network/10-cloud-init-*.network /etc/network/interfaces.d/*
          rm -f /etc/udev/rules.d/*cloud-ifupdown*.rules /etc/udev/rules.d/*persistent-net*.rules
          rm -f /etc/NetworkManager/system-connections/cloud-init-*
          [ ! -d /etc/network ] ||
              printf 'auto lo\niface lo inet loopback\n' >/etc/network/interfaces
          mkdir -p /etc/systemd/network /etc/systemd/networkd.conf.d
          printf '[Match]\nDriver=virtio_net\n[Link]\nUnmanaged=yes\n' \
              >/etc/systemd/network/00-fleetingd.network
          printf '[Network]\nManageForeignRoutes=no\nManageForeignRoutingPolicyRules=no\n' \
              >/etc/systemd/networkd.conf.d/fleetingd.conf
          if [ -d /etc/NetworkManager ]; then
              mkdir -p /etc/NetworkManager/conf.d
              printf '[keyfile]\nunmanaged-devices=driver:virtio_net\n' \
                  >/etc/NetworkManager/conf.d/fleetingd.conf
          fi
          # Masked and disabled by hand: systemctl would reload systemd and run update-rc.d for
          # each, and nothing is started any more. A masked socket that the service requires
          # would keep the service down as well. networkd and resolved have nothing to do: the
          # agent writes a plain resolv.conf.
          units=/etc/systemd/system
          for unit in ssh.socket sshd.socket networking.service ifupdown-pre.service; do
              ln -sf /dev/null "$units/$unit"
          done
          for unit in ssh.service ssh.socket sshd.service sshd.socket systemd-resolved.service \
              systemd-networkd.service systemd-networkd.socket systemd-network-generator.service; do
              rm -f "$units"/*.wants/$unit "$units"/*.requires/$unit
          done
          rm -f "$units/dbus-org.freedesktop.network1.service"
          rm -f "$units/dbus-org.freedesktop.resolve1.service"
          # Run by PAM at each login.
          chmod -x /etc/update-motd.d/* 2>/dev/null
          mkdir -p /etc/cloud
          touch /etc/cloud/cloud-init.disabled
          install -D -m 0755 "$seed/cloud-init-status.sh" /usr/local/bin/cloud-init
          # Mounted when somebody looks: a boot that needs them waits for udev to find their labels.
          awk '$2 ~ "^/boot(/efi)?$" && $4 !~ /automount/ { $4 = $4 ",x-systemd.automount" } 1' \
              /etc/fstab >/etc/fstab.new && mv /etc/fstab.new /etc/fstab
      }

      # What no two machines may share, and what nobody needs.
      clean() {
          rm -rf /etc/ssh/ssh_host_* /etc/ssh/fleetingd_authorized_keys
          rm -rf /var/lib/cloud/instance /var/lib/cloud/instances /var/lib/cloud/seed
          rm -f /var/lib/systemd/random-seed /var/lib/systemd/credential.secret
          # Stays a valid one until the agent replaces it: an empty one is a first boot to systemd,
          # which applies presets and mounts a file of its own over it.
          if mountpoint -q /etc/machine-id; then umount /etc/machine-id; fi
          grep -Eqs '^[0-9a-f]{32}$' /etc/machine-id ||
              tr -d - </proc/sys/kernel/random/uuid >/etc/machine-id
          [ ! -d /var/lib/dbus ] || ln -sf /etc/machine-id /var/lib/dbus/machine-id
          ! command -v apt-get >/dev/null || apt-get clean
          journalctl --rotate --vacuum-size=1 >/dev/null 2>&1
          truncate -s 0 /var/log/cloud-init.log /var/log/cloud-init-output.log 2>/dev/null
      }

      check_growth() {
          disk=$(($(cat /sys/block/vda/size) / 2))
          root=$(df -k --output=size / | tail -n 1)
          [ "$((root * 10))" -ge "$((disk * 8))" ] || warn 'the root file system did not grow'
      }

      rm -rf "$results"
      mkdir -p "$seed" "$results" "$state"
      chmod 0700 "$state"
      : >"$state/prebuild.log"
      tail --pid=$$ -n +1 -f "$state/prebuild.log" &
      exec >>"$state/prebuild.log" 2>&1

      mount -o ro LABEL=CIDATA "$seed" || fail 'the seed volume cannot be mounted'
      check_growth
      say 'masking units'
      mask_noise
      say 'packages'
      packages
      say 'login, agent, sshd'
      set_up_login || fail 'the user cannot be set up'
      install_agent || fail 'the agent cannot be installed'
      set_up_sshd || fail 'sshd is missing or refuses its settings'
      case {{ runner }} in
      binary)
          install -D -m 0755 "$seed/gitlab-runner" /usr/local/bin/gitlab-runner ||
              fail 'gitlab-runner cannot be installed'
          ;;
      package)
          say 'gitlab-runner'
          runner_package ||
              warn 'gitlab-runner could not be installed: artifacts and caches will not work'
          ;;
      esac
      say 'commands of the operator'
      operator_commands || fail 'a command of the operator failed'
      say 'cleaning up'
      leave_to_agent
      clean
      umount "$seed"
      report true ''
      say 'done'
      fstrim -a
      sync
runcmd:
  - [systemctl, daemon-reload]
  - [systemctl, start, --no-block, fleetingd-prebuild.service]
