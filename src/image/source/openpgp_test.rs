//! Ubuntu's key on what Ubuntu published, and keys of our own on everything else.

use pgp::types::Fingerprint;

use super::super::testing::Signer;
use super::*;

const SUMS: &[u8] = include_bytes!("../../../tests/data/ubuntu/SHA256SUMS");
const SIGNATURE: &[u8] = include_bytes!("../../../tests/data/ubuntu/SHA256SUMS.gpg");

fn ubuntu() -> Keyring {
    Keyring::ubuntu(None).unwrap()
}

fn with(signer: &Signer) -> Keyring {
    let mut keyring = Keyring::default();
    keyring.add(&signer.public()).unwrap();
    keyring
}

#[test]
fn the_only_built_in_key_is_the_one_that_signs_ubuntus_images() {
    let prints: Vec<Fingerprint> = ubuntu().keys.iter().map(|key| key.fingerprint()).collect();
    let [print] = prints.as_slice() else {
        panic!("{prints:?}")
    };
    assert_eq!(
        print.to_string().to_uppercase(),
        "D2EB44626FDDC30B513D5BB71A5D6C4C7DB87C81"
    );
}

#[test]
fn what_ubuntu_published_verifies() {
    let signed = ubuntu().verify(SUMS, SIGNATURE).unwrap();
    // What gpg says of it: Sat Sep 26 18:23:12 2026 UTC.
    assert_eq!(signed.at, 1_790_446_992);
}

#[test]
fn each_changed_byte_of_the_checksums_fails() {
    let keyring = ubuntu();
    let mut sums = SUMS.to_vec();
    for at in 0..sums.len() {
        sums[at] ^= 1;
        assert!(keyring.verify(&sums, SIGNATURE).is_err(), "byte {at}");
        sums[at] ^= 1;
    }
    assert!(keyring.verify(&SUMS[1..], SIGNATURE).is_err());
    assert!(keyring.verify(&SUMS[..SUMS.len() - 1], SIGNATURE).is_err());
    assert!(keyring.verify(&[SUMS, b"\n"].concat(), SIGNATURE).is_err());
    assert!(keyring.verify(b"", SIGNATURE).is_err());
}

const AT: u32 = 1_700_000_000;

#[test]
fn the_time_is_the_signers_and_under_the_signature() {
    let signer = Signer::new();
    let signature = signer.sign(b"text", AT);
    let signed = with(&signer).verify(b"text", &signature);
    assert_eq!(signed, Ok(Signed { at: AT }));
    assert!(with(&signer).verify(b"texT", &signature).is_err());
}

#[test]
fn a_key_that_is_not_ours_is_named() {
    let (signer, other) = (Signer::new(), Signer::new());
    let error = with(&other).verify(b"text", &signer.sign(b"text", AT));
    let error = error.unwrap_err();
    assert!(error.ends_with("which is no key of ours"), "{error}");
    assert!(error.contains(&signer.fingerprint()), "{error}");
}

#[test]
fn one_good_signature_of_several_is_enough() {
    let (signer, other) = (Signer::new(), Signer::new());
    let both = [other.binary(b"text", AT), signer.binary(b"text", AT)].concat();
    assert_eq!(with(&signer).verify(b"text", &both), Ok(Signed { at: AT }));
    assert!(
        with(&signer)
            .verify(b"text", &other.binary(b"text", AT))
            .is_err()
    );
}

#[test]
fn what_is_no_signature_is_refused() {
    let keyring = ubuntu();
    for junk in [
        &b""[..],
        b"-----BEGIN PGP SIGNATURE-----\n",
        b"<!DOCTYPE html>",
        &[0xff; 100],
        include_bytes!("uec-image-signing-key.asc"),
    ] {
        assert!(keyring.verify(SUMS, junk).is_err());
    }
}

#[test]
fn a_signature_that_has_expired_or_is_older_than_its_key_is_refused() {
    let signer = Signer::new();
    let keyring = with(&signer);
    let expired = signer.sign_with(b"text", AT, Some(1));
    assert!(
        keyring
            .verify(b"text", &expired)
            .unwrap_err()
            .contains("expired")
    );
    let lasting = signer.sign_with(b"text", AT, Some(u32::MAX - AT));
    assert!(keyring.verify(b"text", &lasting).is_ok());
    let before = signer.sign(b"text", 999_999_999);
    assert!(keyring.verify(b"text", &before).is_err());
}

#[test]
fn a_keyring_without_keys_is_refused() {
    for junk in [&b""[..], b"hello", SIGNATURE] {
        assert!(Keyring::default().add(junk).is_err());
    }
}

#[test]
fn only_a_key_that_is_for_signing_signs() {
    let signing = Signer::with_subkey(true);
    let keyring = with(&signing);
    assert!(keyring.verify(b"text", &signing.sign(b"text", AT)).is_ok());
    let primary = signing.by_primary();
    assert!(keyring.verify(b"text", &primary.sign(b"text", AT)).is_err());

    let other = Signer::with_subkey(false);
    assert!(
        with(&other)
            .verify(b"text", &other.sign(b"text", AT))
            .is_err()
    );
}

#[test]
fn a_subkey_that_its_owner_did_not_bind_is_none() {
    let (owner, other) = (Signer::new(), Signer::with_subkey(true));
    let mut keyring = Keyring::default();
    keyring.add(&owner.public_with_subkeys_of(&other)).unwrap();
    let stranger = other.sign(b"text", AT);
    assert!(keyring.verify(b"text", &stranger).is_err());
    assert!(keyring.verify(b"text", &owner.sign(b"text", AT)).is_ok());
}
