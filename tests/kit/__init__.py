"""What the tests share: real servers, peers, faults, certificates, contracts."""
