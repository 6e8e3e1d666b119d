from phasequant.cli.app import main

main()
