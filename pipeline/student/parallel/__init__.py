"""The division among processes: settings of ZeRO, offloading and exchange."""
