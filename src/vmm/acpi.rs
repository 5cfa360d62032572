//! The ACPI tables: hardware-reduced, so that no legacy timer, controller or event block exists.
//!
//! Sleep and reset go through one port; one generic event device reports the power button and a
//! changed VM generation. Built once before the VM runs.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Device, EISAName, Field, FieldAccessType, FieldEntry,
    FieldLockRule, FieldUpdateRule, IO, If, Interrupt, Local, Memory32Fixed, Method, Name, Notify,
    OpRegion, OpRegionSpace, Package, Path, ResourceTemplate, Scope, Store,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace as GasSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, aml};
use vm_memory::{Bytes, GuestAddress};

use super::layout;
use crate::devices::GuestMemory;

const OEM: [u8; 6] = *b"FLEETD";
const TABLE: [u8; 8] = *b"FLEETVMM";
const REVISION: u32 = 1;
/// Size of a table's header (ACPI 6.5, 5.2.6).
const HEADER_BYTES: u32 = 36;
/// FADT IAPC_BOOT_ARCH (ACPI 6.5, table 5.11): no VGA, no CMOS clock; and neither legacy devices
/// nor an i8042, whose probing costs half a second.
const NO_LEGACY: u16 = (1 << 2) | (1 << 5);

/// The tables do not fit, which only a bug can cause.
#[derive(Debug, thiserror::Error)]
#[error("ACPI tables of {bytes} bytes do not fit below 1 MiB")]
pub struct AcpiError {
    bytes: u64,
}

/// Writes all tables and returns the address of the RSDP.
pub fn write(memory: &GuestMemory, vcpus: u8) -> Result<GuestAddress, AcpiError> {
    let mut area = Area {
        memory,
        next: layout::ACPI_START,
    };
    let rsdp_at = area.reserve(Rsdp::len() as u64)?;
    let dsdt = area.put(&dsdt(vcpus))?;
    let fadt = area.put(&fadt(dsdt))?;
    let madt = area.put(&madt(vcpus))?;
    let mcfg = area.put(&mcfg())?;
    let mut xsdt = XSDT::new(OEM, TABLE, REVISION);
    for table in [fadt, madt, mcfg] {
        xsdt.add_entry(table);
    }
    let xsdt = area.put(&bytes_of(&xsdt))?;
    area.write(rsdp_at, &bytes_of(&Rsdp::new(OEM, xsdt)))?;
    Ok(GuestAddress(rsdp_at))
}

struct Area<'a> {
    memory: &'a GuestMemory,
    next: u64,
}

impl Area<'_> {
    fn reserve(&mut self, bytes: u64) -> Result<u64, AcpiError> {
        let at = self.next;
        self.next = (at + bytes).next_multiple_of(16);
        if self.next > layout::HIGH_MEMORY_START {
            return Err(AcpiError { bytes });
        }
        Ok(at)
    }

    fn put(&mut self, table: &[u8]) -> Result<u64, AcpiError> {
        let at = self.reserve(table.len() as u64)?;
        self.write(at, table)?;
        Ok(at)
    }

    fn write(&self, at: u64, table: &[u8]) -> Result<(), AcpiError> {
        self.memory
            .write_slice(table, GuestAddress(at))
            .map_err(|_outside| AcpiError {
                bytes: table.len() as u64,
            })
    }
}

fn bytes_of(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn fadt(dsdt: u64) -> Vec<u8> {
    let register = GAS::new(
        GasSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        u64::from(layout::SLEEP_PORT),
    );
    let mut builder = FADTBuilder::new(OEM, TABLE, REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    builder.iapc_boot_arch = NO_LEGACY.into();
    builder.reset_reg = register;
    builder.reset_value = layout::RESET_VALUE;
    builder.sleep_control_reg = register;
    builder.sleep_status_reg = register;
    bytes_of(&builder.finalize())
}

fn madt(vcpus: u8) -> Vec<u8> {
    let lapic = LocalInterruptController::Address(layout::LAPIC);
    let mut table = MADT::new(OEM, TABLE, REVISION, lapic);
    for cpu in 0..vcpus {
        table.add_structure(ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled));
    }
    table.add_structure(IoApic::new(0, layout::IOAPIC, 0));
    bytes_of(&table)
}

fn mcfg() -> Vec<u8> {
    let mut table = MCFG::new(OEM, TABLE, REVISION);
    table.add_ecam(layout::ECAM, 0, 0, 0);
    bytes_of(&table)
}

fn dsdt(vcpus: u8) -> Vec<u8> {
    let mut table = Sdt::new(*b"DSDT", HEADER_BYTES, 6, OEM, TABLE, REVISION);
    for part in [pci(), serial(), generation_id(), events(), sleep_state()] {
        table.append_slice(&part);
    }
    table.append_slice(&processors(vcpus));
    table.as_slice().to_vec()
}

/// Windows of the layout are below 4 GiB.
fn low(address: u64) -> u32 {
    u32::try_from(address).unwrap_or(u32::MAX)
}

fn pci() -> Vec<u8> {
    let window_end = low(layout::BAR_WINDOW + layout::BAR_WINDOW_SIZE - 1);
    let bus = AddressSpace::new_bus_number(0_u16, 0);
    let config_ports = IO::new(layout::PCI_CONFIG_PORT, layout::PCI_CONFIG_PORT, 1, 8);
    let window = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        low(layout::BAR_WINDOW),
        window_end,
        None,
    );
    let resources = ResourceTemplate::new(vec![&bus, &config_ports, &window]);
    let ecam = Memory32Fixed::new(true, low(layout::ECAM), low(layout::ECAM_SIZE));
    let ecam = ResourceTemplate::new(vec![&ecam]);
    let mut bytes = bytes_of(&Device::new(
        "_SB_.PCI0".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
            &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
            &Name::new("_SEG".into(), &aml::ZERO),
            &Name::new("_BBN".into(), &aml::ZERO),
            &Name::new("_UID".into(), &aml::ZERO),
            &Name::new("_CCA".into(), &aml::ONE),
            &Name::new("_CRS".into(), &resources),
        ],
    ));
    // Linux believes in the ECAM only if a motherboard resource reserves it.
    bytes.extend(bytes_of(&Device::new(
        "_SB_.MB00".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C02")),
            &Name::new("_UID".into(), &aml::ZERO),
            &Name::new("_CRS".into(), &ecam),
        ],
    )));
    bytes
}

fn serial() -> Vec<u8> {
    let ports = IO::new(layout::COM1, layout::COM1, 1, 8);
    let line = Interrupt::new(true, true, false, false, layout::COM1_IRQ);
    bytes_of(&Device::new(
        "_SB_.COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &aml::ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ports, &line])),
        ],
    ))
}

/// The 128-bit generation of this VM: a guest reseeds its randomness when it changes.
fn generation_id() -> Vec<u8> {
    let address = Package::new(vec![&layout::VM_GENERATION_ID, &aml::ZERO]);
    bytes_of(&Device::new(
        "_SB_.VGEN".into(),
        vec![
            &Name::new("_HID".into(), &"FLTD0001"),
            &Name::new("_CID".into(), &"VM_Gen_Counter"),
            &Name::new("_DDN".into(), &"VM_Gen_Counter"),
            &Name::new("ADDR".into(), &address),
        ],
    ))
}

/// The generic event device: its method reads what happened and passes it on.
fn events() -> Vec<u8> {
    let line = Interrupt::new(true, true, false, false, layout::GED_IRQ);
    let port = u64::from(layout::GED_PORT);
    let what = Local(0);
    let happened = Path::new("GEVT");
    let read = Store::new(&what, &happened);
    let power = And::new(&Local(1), &what, &layout::GED_POWER_BUTTON);
    // From the root: a name of several segments is not looked for in the scopes above.
    let pressed = Notify::new(&Path::new("\\_SB_.PWRB"), &0x80_u8).into_bytes();
    let generation = And::new(&Local(2), &what, &layout::GED_GENERATION);
    let changed = Notify::new(&Path::new("\\_SB_.VGEN"), &0x80_u8).into_bytes();
    let pressed = If::new(&Local(1), vec![&pressed]).into_bytes();
    let changed = If::new(&Local(2), vec![&changed]).into_bytes();
    let mut bytes = bytes_of(&Device::new(
        "_SB_.PWRB".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C0C")),
            &Name::new("_UID".into(), &aml::ZERO),
        ],
    ));
    bytes.extend(bytes_of(&Device::new(
        "_SB_.GED_".into(),
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_UID".into(), &aml::ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&line])),
            &OpRegion::new("GREG".into(), OpRegionSpace::SystemIO, &port, &aml::ONE),
            &Field::new(
                "GREG".into(),
                FieldAccessType::Byte,
                FieldLockRule::NoLock,
                FieldUpdateRule::WriteAsZeroes,
                vec![FieldEntry::Named(*b"GEVT", 8)],
            ),
            &Method::new(
                "_EVT".into(),
                1,
                true,
                vec![&read, &power, &pressed, &generation, &changed],
            ),
        ],
    )));
    bytes
}

/// AML made already.
struct Bytes_(Vec<u8>);

impl Aml for Bytes_ {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}

trait IntoBytes: Aml + Sized {
    /// Made now, so that what it borrows may go.
    fn into_bytes(self) -> Bytes_ {
        Bytes_(bytes_of(&self))
    }
}

impl<T: Aml> IntoBytes for T {}

fn sleep_state() -> Vec<u8> {
    let five = 5_u8;
    bytes_of(&Name::new(
        "_S5_".into(),
        &Package::new(vec![&five, &five, &aml::ZERO, &aml::ZERO]),
    ))
}

fn processors(vcpus: u8) -> Vec<u8> {
    let mut bytes = Vec::new();
    for cpu in 0..vcpus {
        let name = format!("C{cpu:03X}");
        bytes.extend(bytes_of(&Device::new(
            Path::new(&name),
            vec![
                &Name::new("_HID".into(), &"ACPI0007"),
                &Name::new("_UID".into(), &cpu),
            ],
        )));
    }
    bytes_of(&Scope::new("_SB_".into(), vec![&Bytes_(bytes)]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::memory::VmMemory;

    fn table_at(memory: &GuestMemory, at: u64) -> Vec<u8> {
        let mut length = [0; 4];
        memory
            .read_slice(&mut length, GuestAddress(at + 4))
            .unwrap();
        let mut table = vec![0; u32::from_le_bytes(length) as usize];
        memory.read_slice(&mut table, GuestAddress(at)).unwrap();
        let sum = table.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
        assert_eq!(
            sum,
            0,
            "checksum of {}",
            String::from_utf8_lossy(&table[..4])
        );
        table
    }

    fn pointer(bytes: &[u8]) -> u64 {
        u64::from_le_bytes(bytes[..8].try_into().unwrap())
    }

    #[test]
    fn every_table_is_found_from_the_rsdp_and_sums_to_zero() {
        for vcpus in [1, 2, 64] {
            let memory = VmMemory::anonymous(64).unwrap();
            let rsdp = write(memory.guest(), vcpus).unwrap();
            let mut bytes = [0; 36];
            memory.guest().read_slice(&mut bytes, rsdp).unwrap();
            assert_eq!(&bytes[..8], b"RSD PTR ");
            let xsdt = table_at(memory.guest(), pointer(&bytes[24..]));
            let tables: Vec<Vec<u8>> = xsdt[36..]
                .chunks(8)
                .map(|entry| table_at(memory.guest(), pointer(entry)))
                .collect();
            let names: Vec<&[u8]> = tables.iter().map(|t| &t[..4]).collect();
            assert_eq!(names, [b"FACP", b"APIC", b"MCFG"]);
            let dsdt = table_at(memory.guest(), pointer(&tables[0][140..]));
            assert_eq!(&dsdt[..4], b"DSDT");
            // Eight bytes a LAPIC, twelve an IOAPIC behind the 44 of the header.
            assert_eq!(tables[1].len(), 44 + usize::from(vcpus) * 8 + 12);
        }
    }

    #[test]
    fn the_fadt_says_hardware_reduced_and_how_to_sleep() {
        let table = fadt(0x1234);
        let flags = u32::from_le_bytes(table[112..116].try_into().unwrap());
        assert_ne!(flags & (1 << 20), 0, "HW_REDUCED_ACPI");
        assert_ne!(flags & (1 << 10), 0, "RESET_REG_SUP");
        assert_eq!(table[128], layout::RESET_VALUE);
        let port = u64::from(layout::SLEEP_PORT);
        for register in [116, 244, 256] {
            assert_eq!(table[register], 1, "system I/O");
            assert_eq!(pointer(&table[register + 4..]), port);
        }
    }
}
