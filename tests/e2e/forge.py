# Sends frames that this machine has no right to, each with its mark, and then honest ones.
import socket
import struct
import sys

mac, ip, gateway_mac, gateway, other, world = sys.argv[1:]
FORGED_MAC = "02:00:00:e2:e2:e2"
IPV4, ARP, VLAN, IPV6 = 0x0800, 0x0806, 0x8100, 0x86DD
ICMP, UDP, ICMPV6 = 1, 17, 58


def hardware(text):
    return bytes.fromhex(text.replace(":", ""))


def checksum(data):
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack("!%dH" % (len(data) // 2), data))
    total = (total >> 16) + (total & 0xFFFF)
    return ~(total + (total >> 16)) & 0xFFFF


def ether(source, kind, body, target=gateway_mac):
    return hardware(target) + hardware(source) + struct.pack("!H", kind) + body


def ipv4(protocol, source, target, body):
    source, target = socket.inet_aton(source), socket.inet_aton(target)
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(body), 1, 0, 64, protocol, 0, source, target)
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + body


def ipv6(protocol, body):
    source = socket.inet_pton(socket.AF_INET6, "fe80::e2e")
    everyone = socket.inet_pton(socket.AF_INET6, "ff02::1")
    return struct.pack("!IHBB16s16s", 0x60000000, len(body), protocol, 255, source, everyone) + body


def udp(mark, port=4085):
    return struct.pack("!HHHH", port, 4085, 8 + len(mark), 0) + mark


def echo(mark):
    message = struct.pack("!BBHHH", 8, 0, 0, 7, 1) + mark
    return message[:2] + struct.pack("!H", checksum(message)) + message[4:]


def arp(operation, sender_mac, sender, mark):
    asked = hardware(gateway_mac) + socket.inet_aton(gateway)
    sender = hardware(sender_mac) + socket.inet_aton(sender)
    return struct.pack("!HHBBH", 1, IPV4, 6, 4, operation) + sender + asked + mark


def send(frame):
    card.send(frame)


card = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
name = next(name for _, name in socket.if_nameindex() if name != "lo")
card.bind((name, 0))
everyone6 = "33:33:00:00:00:01"

send(ether(mac, IPV4, ipv4(UDP, other, world, udp(b"e2e:neighbours-address"))))
send(ether(mac, IPV4, ipv4(UDP, "192.0.2.77", world, udp(b"e2e:foreign-address"))))
send(ether(FORGED_MAC, IPV4, ipv4(UDP, ip, world, udp(b"e2e:forged-mac"))))
send(ether(mac, IPV4, ipv4(ICMP, other, gateway, echo(b"e2e:neighbours-echo"))))
send(ether(mac, IPV4, ipv4(ICMP, gateway, world, echo(b"e2e:hosts-address"))))
send(ether(mac, VLAN, struct.pack("!HH", 0, IPV4) + ipv4(UDP, other, world, udp(b"e2e:vlan"))))
send(ether(mac, IPV4, ipv4(UDP, ip, world, udp(b"e2e:dhcp-server", 67))))
send(ether(mac, ARP, arp(2, mac, other, b"e2e:arp-neighbour")))
send(ether(mac, ARP, arp(2, mac, gateway, b"e2e:arp-gateway")))
send(ether(mac, ARP, arp(1, FORGED_MAC, ip, b"e2e:arp-mac")))
send(ether(mac, IPV6, ipv6(UDP, udp(b"e2e:ipv6")), everyone6))
send(ether(mac, IPV6, ipv6(ICMPV6, struct.pack("!BBHBBHII", 134, 0, 0, 64, 0, 1800, 0, 0) + b"e2e:router"), everyone6))
send(ether(mac, IPV4, ipv4(ICMP, ip, gateway, echo(b"e2e:honest-echo"))))
send(ether(mac, IPV4, ipv4(UDP, ip, world, udp(b"e2e:honest-packet"))))
